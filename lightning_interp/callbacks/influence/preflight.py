"""Reasons for caution that are known before a score is computed."""

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

LOSS_TOLERANCE = 1e-3  # relative: above float32's rounding, below the difference between two kinds of loss


def augmentation_warning(task: Task, first: Any, second: Any) -> str:
    """Return a warning if a dataset gave other inputs the second time it was read, else an empty text."""
    pairs = zip(tensors(task.inputs(first)), tensors(task.inputs(second)), strict=True)
    # NaN, a missing value in tables, differs from itself.
    if all(a.shape == b.shape and bool(((a == b) | (a != a)).all()) for a, b in pairs):
        return ""
    return (
        "the training set returns other inputs each time it is read (augmentation?), so scores are those of one draw;"
        " pass train_dataset= without it"
    )


def averaging_warning(trainer: pl.Trainer, callback: Callback) -> str:
    """Return a warning if a callback will put averaged weights into the network after this one scored with it."""
    callbacks = getattr(trainer, "callbacks", [])
    later = callbacks[callbacks.index(callback) + 1 :] if callback in callbacks else []
    # By name along the classes, so that no version of Lightning without one of them fails to import it.
    averaging = [type(c).__name__ for c in later if {kind.__name__ for kind in type(c).__mro__} & set(AVERAGING)]
    if not averaging:
        return ""
    return f"scores are those of the weights before {averaging[0]} averages them; list DataInfluence after it"


def unrecorded_steps_warning(trainer: pl.Trainer, recorded: int) -> str:
    """Return a warning if training resumes from a checkpoint without a record of the steps before it."""
    if recorded or not trainer.global_step or trainer.should_stop:
        return ""
    return (
        f"the first {trainer.global_step:,} steps were trained without this callback, so that the damping, which"
        " follows from the learning rates of the others, comes out too large; pass an estimator with damping="
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
    samples = slice_samples(batch, 0, 4)
    with torch.no_grad():
        task_loss = float(task.losses(module, samples)[2].mean())
    step_loss = _loss_of_step(module, samples)
    if step_loss is None or abs(task_loss - step_loss) <= LOSS_TOLERANCE * max(1.0, abs(step_loss)):
        return ""
    return (
        f"the loss that is explained, {task_loss:.4g} on a few samples, is not the one of training_step,"
        f" {step_loss:.4g}; pass task=Task(loss=...) to explain your own"
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
