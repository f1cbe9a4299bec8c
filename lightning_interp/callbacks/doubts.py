"""What speaks against influence scores before a single one is computed."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_interp.batch import tensors
from lightning_interp.task import Task

AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


def augmented(task: Task, first: Any, again: Any) -> str:
    """Say so, if a dataset gave other inputs the second time it was read."""
    pairs = zip(tensors(task.inputs(first)), tensors(task.inputs(again)), strict=True)
    if all(a.shape == b.shape and bool(((a == b) | (a != a)).all()) for a, b in pairs):
        return ""
    return (
        "the training set returns other inputs each time it is read (augmentation?), so scores are those of one draw;"
        " pass train_dataset= without it"
    )


def averaged(trainer: pl.Trainer, callback: Callback) -> str:
    """Say so, if a callback will put averaged weights into the network after this one has looked at it."""
    held = getattr(trainer, "callbacks", [])
    later = held[held.index(callback) + 1 :] if callback in held else []
    kinds = [type(other).__name__ for other in later if {k.__name__ for k in type(other).__mro__} & set(AVERAGING)]
    if not kinds:
        return ""
    return f"scores are those of the weights before {kinds[0]} averages them; list DataInfluence after it"


def unrecorded(trainer: pl.Trainer, recorded: int) -> str:
    """Say so, if training goes on from a checkpoint whose steps nobody recorded."""
    if recorded or not trainer.global_step or trainer.should_stop:
        return ""
    return (
        f"the first {trainer.global_step:,} steps were trained without this callback, so that the damping, which goes"
        " by the learning rates of the others, comes out too large; pass an estimator with damping="
    )
