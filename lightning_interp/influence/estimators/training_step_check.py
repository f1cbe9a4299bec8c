"""Checks of a training step as the loss: it must be a mean over samples, and the loss of the Task's outputs."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from lightning_interp.data.batch import device_of, to_device
from lightning_interp.data.samples import Samples
from lightning_interp.data.task import SAMPLES_TO_SETTLE, Task, settle_kind
from lightning_interp.influence.curvature import Curvature
from lightning_interp.influence.curvature.curvature import needs_outputs

COMPARED_LOSSES = 8  # samples, of different targets: class weights show in two, tokens that are counted in a few
RELATIVE_TOLERANCE = 1e-4  # losses agree to float32's rounding of sums in another order
ABSOLUTE_TOLERANCE = 1e-6  # for losses near zero
_ADVICE = (
    "curvature is taken from; pass Task.from_training_step(outputs=..., loss=...) that agree with the step, or"
    " InfluenceFunction(DataInf()) or InfluenceFunction(IdentityCurvature()), which need gradients alone"
)


def check_training_step(task: Task, model: nn.Module, train: Samples, curvature: Curvature | None) -> Task:
    """Return a task by training steps with its kind settled, after checking that influence can use them.

    Args:
        task: with a `step`.
        model: in eval mode.
        train: training samples.
        curvature: which may need outputs and their loss; the default ones (None) do.

    Raises:
        ValueError: the step is no mean over samples; or the curvature needs outputs, and their loss is not the step's.
    """
    batch = to_device(next(iter(_of_different_targets(task, train))), device_of(model))
    with torch.no_grad():
        alone = task.one_by_one(model, batch)
        _check_mean(task.total(model, batch) / len(alone), alone.mean(), len(alone))
    gradients_alone = curvature is not None and not needs_outputs(curvature)
    plain = dataclasses.replace(task, step=None)
    try:
        kind = settle_kind(plain, model, batch, train.spread(SAMPLES_TO_SETTLE)).kind
        with torch.no_grad():
            output_losses = dataclasses.replace(plain, kind=kind).losses(model, batch)[2]
    except Exception as error:
        if gradients_alone:
            return task
        raise ValueError(f"task: outputs and their loss cannot be read ({error}), which {_ADVICE}") from error
    if not gradients_alone:
        _check_agreement(output_losses, alone)
    return dataclasses.replace(task, kind=kind)


def _of_different_targets(task: Task, train: Samples) -> Samples:
    """Return one sample of each of a few targets, or two where all are equal."""
    spread = train.spread(SAMPLES_TO_SETTLE)
    targets = [tuple(row.flatten().tolist()) for batch in spread for row in task.targets(batch)]
    first = {target: index for index, target in reversed(list(enumerate(targets)))}
    indices = sorted(first.values())[:COMPARED_LOSSES] if len(first) > 1 else range(min(2, len(spread)))
    return dataclasses.replace(spread.at(indices), batch_size=COMPARED_LOSSES)


def _check_mean(together: Tensor, alone: Tensor, n: int) -> None:
    if not _losses_agree(together, alone):
        raise ValueError(
            f"task: expected a training step whose loss is a mean over samples, but that of {n} samples together is"
            f" {float(together):.4g}, and the mean of their losses alone {float(alone):.4g} (are classes weighted,"
            " tokens counted, or losses summed?); pass task=Task(loss=...) that gives one loss per sample"
        )


def _check_agreement(output_losses: Tensor, step_losses: Tensor) -> None:
    if not _losses_agree(output_losses, step_losses):
        worst = int((output_losses - step_losses).abs().argmax())
        raise ValueError(
            f"task: the loss of the outputs, {float(output_losses[worst]):.4g} for one sample, is not that of its"
            f" training step, {float(step_losses[worst]):.4g}; the former {_ADVICE}"
        )


def _losses_agree(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b.to(a), rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE)
