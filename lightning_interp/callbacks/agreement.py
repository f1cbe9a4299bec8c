"""Does the Task's loss agree with the module's own training step?"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_interp.batch import take
from lightning_interp.task import Task

TOLERANCE = 1e-3


def disagreement(module: pl.LightningModule, task: Task, batch: Any) -> str:
    """Run a copy's `training_step` on a few samples, in eval mode, and compare its loss with the Task's mean loss.

    The copy has no trainer and logs nothing, so the step can change neither the run nor its metrics.

    Args:
        module: in eval mode (see `lightning_interp.capture.undisturbed`).
        task: whose loss is compared.
        batch: on the module's device; its first four samples are used.

    Returns:
        What disagrees, in words; empty if nothing does, or where the step cannot run without a trainer.

    Raises:
        ValueError: the Task cannot read the batch or call the model.
    """
    few = take(batch, 0, 4)
    with torch.no_grad():
        ours = float(task.losses(module, few)[2].mean())
    theirs = _loss_of_step(module, few)
    if theirs is None or abs(ours - theirs) <= TOLERANCE * max(1.0, abs(theirs)):
        return ""
    return (
        f"the loss that is explained, {ours:.4g} on a few samples, is not the one of training_step, {theirs:.4g};"
        " pass task=Task(loss=...) to explain your own"
    )


def _loss_of_step(module: pl.LightningModule, batch: Any) -> float | None:
    if not module.automatic_optimization:
        return None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            twin = copy.deepcopy(module).eval()
            for name in ("log", "log_dict"):
                setattr(twin, name, lambda *_, **__: None)
            result = twin.training_step(batch, 0)
        except Exception:
            return None
    loss = result.get("loss") if isinstance(result, dict) else result
    return float(loss) if isinstance(loss, Tensor) and loss.numel() == 1 else None
