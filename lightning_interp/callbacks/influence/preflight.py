"""What speaks against influence scores before a single one is computed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_interp.data.batch import slice_samples, tensors
from lightning_interp.data.task import Task

AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")

TOLERANCE = 1e-3


def augmentation_warning(task: Task, first: Any, again: Any) -> str:
    """Say so, if a dataset gave other inputs the second time it was read."""
    pairs = zip(tensors(task.inputs(first)), tensors(task.inputs(again)), strict=True)
    if all(a.shape == b.shape and bool(((a == b) | (a != a)).all()) for a, b in pairs):
        return ""
    return (
        "the training set returns other inputs each time it is read (augmentation?), so scores are those of one draw;"
        " pass train_dataset= without it"
    )


def averaging_warning(trainer: pl.Trainer, callback: Callback) -> str:
    """Say so, if a callback will put averaged weights into the network after this one has looked at it."""
    held = getattr(trainer, "callbacks", [])
    later = held[held.index(callback) + 1 :] if callback in held else []
    kinds = [type(other).__name__ for other in later if {k.__name__ for k in type(other).__mro__} & set(AVERAGING)]
    if not kinds:
        return ""
    return f"scores are those of the weights before {kinds[0]} averages them; list DataInfluence after it"


def unrecorded_steps_warning(trainer: pl.Trainer, recorded: int) -> str:
    """Say so, if training goes on from a checkpoint whose steps nobody recorded."""
    if recorded or not trainer.global_step or trainer.should_stop:
        return ""
    return (
        f"the first {trainer.global_step:,} steps were trained without this callback, so that the damping, which goes"
        " by the learning rates of the others, comes out too large; pass an estimator with damping="
    )


def loss_disagreement(module: pl.LightningModule, task: Task, batch: Any) -> str:
    """Run a copy's `training_step` on a few samples, in eval mode, and compare its loss with the Task's mean loss.

    The copy has no trainer and logs nothing, so the step can change neither the run nor its metrics.

    Args:
        module: in eval mode (see `lightning_interp.network.undisturbed.undisturbed`).
        task: whose loss is compared.
        batch: on the module's device; its first four samples are used.

    Returns:
        What disagrees, in words; empty if nothing does, or where the step cannot run without a trainer.

    Raises:
        ValueError: the Task cannot read the batch or call the model.
    """
    few = slice_samples(batch, 0, 4)
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
