"""A training step as the loss: is it a mean over samples, and that of the Task's outputs?"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from lightning_interp.data.batch import device_of, to_device
from lightning_interp.data.samples import Samples
from lightning_interp.data.task import SAMPLES_TO_SETTLE, Task, settle_kind
from lightning_interp.influence.curvature import Curvature
from lightning_interp.influence.curvature.curvature import needs_outputs

COMPARED = 8
RELATIVE = 1e-4
ABSOLUTE = 1e-6
_ADVICE = (
    "curvature is taken from; pass Task.from_training_step(outputs=..., loss=...) that agree with the step, or"
    " InfluenceFunction(IdentityCurvature()), which needs gradients alone"
)


def check_training_step(task: Task, model: nn.Module, train: Samples, curvature: Curvature | None) -> Task:
    """Return a task by training steps with its kind settled, once it is sure that influence can go by them.

    Args:
        task: with a `step`.
        model: in eval mode.
        train: training samples.
        curvature: whether it needs the outputs and their loss, as any does that is chosen by default (None).

    Raises:
        ValueError: the step is no mean over samples; or the curvature needs outputs, and their loss is not the step's.
    """
    some = _of_different_targets(task, train)
    few = to_device(next(iter(some)), device_of(model))
    with torch.no_grad():
        alone = task.one_by_one(model, few)
        _check_mean(task.total(model, few) / len(alone), alone.mean(), len(alone))
    gradients_alone = curvature is not None and not needs_outputs(curvature)
    plain = dataclasses.replace(task, step=None)
    try:
        kind = settle_kind(plain, model, few, train.spread(SAMPLES_TO_SETTLE)).kind
        with torch.no_grad():
            ours = dataclasses.replace(plain, kind=kind).losses(model, few)[2]
    except Exception as error:
        if gradients_alone:
            return task
        raise ValueError(f"task: outputs and their loss cannot be read ({error}), which {_ADVICE}") from error
    if not gradients_alone:
        _check_agreement(ours, alone)
    return dataclasses.replace(task, kind=kind)


def _of_different_targets(task: Task, train: Samples) -> Samples:
    """Return one sample of each of a few targets, or two where all are equal."""
    spread = train.spread(SAMPLES_TO_SETTLE)
    targets = [tuple(row.flatten().tolist()) for batch in spread for row in task.targets(batch)]
    first = {target: place for place, target in reversed(list(enumerate(targets)))}
    places = sorted(first.values())[:COMPARED] if len(first) > 1 else range(min(2, len(spread)))
    return dataclasses.replace(spread.at(places), batch_size=COMPARED)


def _check_mean(together: Tensor, alone: Tensor, n: int) -> None:
    if not _close(together, alone):
        raise ValueError(
            f"task: expected a training step whose loss is a mean over samples, but that of {n} samples together is"
            f" {float(together):.4g}, and the mean of their losses alone {float(alone):.4g} (are classes weighted,"
            " tokens counted, or losses summed?); pass task=Task(loss=...) that gives one loss per sample"
        )


def _check_agreement(ours: Tensor, steps: Tensor) -> None:
    if not _close(ours, steps):
        worst = int((ours - steps).abs().argmax())
        raise ValueError(
            f"task: the loss of the outputs, {float(ours[worst]):.4g} for one sample, is not that of its training step,"
            f" {float(steps[worst]):.4g}; the former {_ADVICE}"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b.to(a), rtol=RELATIVE, atol=ABSOLUTE)
