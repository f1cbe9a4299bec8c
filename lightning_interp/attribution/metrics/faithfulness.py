"""Faithfulness: the score while positions are deleted or inserted in the order of a map."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lightning_interp.attribution.engine.batching import batches_of_variants, of_rows
from lightning_interp.attribution.engine.explained_input import ExplainedInput
from lightning_interp.attribution.engine.target import Score, Target, probability, select
from lightning_interp.attribution.metrics.mean import MeanOverSamples
from lightning_interp.attribution.metrics.rank_correlation import all_finite, at_positions, rank_positions
from lightning_interp.attribution.perturbed.baseline import Baseline, baseline_like
from lightning_interp.checks import check_count
from lightning_interp.data.task import Task
from lightning_interp.network.undisturbed import explaining

STEPS = 16  # bounds the cost: a curve takes one forward per step and one more


def deletion_curve(
    model: nn.Module,
    inputs: Any,
    maps: Float[Tensor, "n *shape"],
    target: Target,
    task: Task = Task(),
    steps: int = STEPS,
    baseline: Baseline = 0.0,
    score: Score = probability,
    batch_size: int = 32,
) -> Float[Tensor, "n points"]:
    """Return the target's probability while the input's positions turn into the baseline, most important first.

    Entry k is the score with the first k / steps of the positions replaced, to the nearest whole number: entry 0 is
    that of the input, the last that of the baseline. A position is a pixel (all channels of it), a token that
    `task.mask` keeps, a step or a column; it is as important as `at_positions` says, equal ones come in a random order
    that the sample itself seeds: a constant map scores like chance. The row of a map that is not finite is NaN. The
    network is evaluated on inputs unlike those it was trained on: a fall may come from that, so compare with
    `Centre()` and `Edges()`. It takes steps + 1 forwards.

    Reference: Petsiuk et al., RISE: Randomized Input Sampling for Explanation of Black-box Models, 2018.

    Args:
        model: any module; it runs in eval mode.
        inputs: what `task.outputs(model, ...)` takes, on the model's device.
        maps: one per sample, `(n, *positions)` or in the shape of the input.
        target: class per sample `(n,)`, or a function outputs → `(n,)`.
        task: how to call the model.
        steps: in how many the input is replaced.
        baseline: what replaced positions become: a number (of token ids, the mask or padding token), one per channel
            or column, a tensor in the shape of one sample, or a function of the inputs, such as a blur.
        score: what the curve is of: `probability`, `logit`, `label_probability`, or a function like them.
        batch_size: changed copies at a time.

    Raises:
        ValueError: the maps, the target or the baseline do not fit.
    """
    return _replaced(False, model, inputs, maps, target, task, steps, baseline, score, batch_size)[1]


def insertion_curve(
    model: nn.Module,
    inputs: Any,
    maps: Float[Tensor, "n *shape"],
    target: Target,
    task: Task = Task(),
    steps: int = STEPS,
    baseline: Baseline = 0.0,
    score: Score = probability,
    batch_size: int = 32,
) -> Float[Tensor, "n points"]:
    """Return the target's probability while the input's positions replace the baseline, most important first.

    The way back of `deletion_curve`, with the same arguments: entry 0 is the score of the baseline, the last that of
    the input.

    Reference: Petsiuk et al., RISE: Randomized Input Sampling for Explanation of Black-box Models, 2018.
    """
    return _replaced(True, model, inputs, maps, target, task, steps, baseline, score, batch_size)[1]


class _Area(MeanOverSamples):
    """Mean area under a curve of scores; abstract."""

    inserting: bool

    def __init__(
        self,
        steps: int = STEPS,
        baseline: Baseline = 0.0,
        score: Score = probability,
        batch_size: int = 32,
    ) -> None:
        check_count(type(self).__name__, "steps", steps)
        check_count(type(self).__name__, "batch_size", batch_size)
        super().__init__(steps, baseline, score)
        self.options = (steps, baseline, score, batch_size)

    def update(
        self, model: nn.Module, inputs: Any, maps: Float[Tensor, "n *shape"], target: Target, task: Task = Task()
    ) -> None:
        """Add a batch.

        Args:
            model: any module; it runs in eval mode.
            inputs: what `task.outputs(model, ...)` takes, on the model's device.
            maps: one per sample, `(n, *positions)` or in the shape of the input.
            target: class per sample `(n,)`, or a function outputs → `(n,)`.
            task: how to call the model.

        Raises:
            ValueError: the maps, the target or the baseline do not fit.
        """
        shares, curve = _replaced(self.inserting, model, inputs, maps, target, task, *self.options)
        self.add(torch.trapezoid(curve, shares, dim=1))


class DeletionArea(_Area):
    """Mean area under `deletion_curve`, by the trapezoid rule over the share of positions replaced: low is good.

    In [0, 1] for a probability. NaN as soon as one map is not finite.

    Reference: Petsiuk et al., RISE: Randomized Input Sampling for Explanation of Black-box Models, 2018.

    Args:
        steps: in how many the input is replaced; an update takes one forward more of the batch.
        baseline: what replaced positions become, as of `deletion_curve`.
        score: what the curve is of.
        batch_size: changed copies at a time.
    """

    higher_is_better = False
    inserting = False


class InsertionArea(_Area):
    """Mean area under `insertion_curve`, by the trapezoid rule over the share of positions shown: high is good.

    In [0, 1] for a probability. NaN as soon as one map is not finite.

    Reference: Petsiuk et al., RISE: Randomized Input Sampling for Explanation of Black-box Models, 2018.

    Args:
        steps: in how many the input is shown; an update takes one forward more of the batch.
        baseline: what positions are before, as of `deletion_curve`.
        score: what the curve is of.
        batch_size: changed copies at a time.
    """

    higher_is_better = True
    inserting = True


class DeadMaps(MeanOverSamples):
    """Share of maps without information: zero everywhere, or not finite.

    >>> metric = DeadMaps()
    >>> metric.update(torch.tensor([[0.0, 0.0], [0.0, 1.0], [torch.nan, 1.0], [2.0, 1.0]]))
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False

    def update(self, maps: Float[Tensor, "n *shape"]) -> None:
        """Add a batch of maps of any shape."""
        self.add(dead(maps).double())


def dead(maps: Float[Tensor, "n *shape"]) -> Bool[Tensor, " n"]:
    """Return which maps have no information: zero everywhere, or not finite."""
    return (maps == 0).flatten(1).all(1) | ~all_finite(maps)


def _replaced(
    inserting: bool,
    model: nn.Module,
    inputs: Any,
    maps: Tensor,
    target: Target,
    task: Task,
    steps: int,
    baseline: Baseline,
    score: Score,
    batch_size: int,
) -> tuple[Float[Tensor, "n points"], Float[Tensor, "n points"]]:
    """Return the share of positions replaced at each step, and the score there."""
    check_count("insertion_curve" if inserting else "deletion_curve", "steps", steps)
    with explaining(model), torch.no_grad():
        explained = ExplainedInput(model, inputs, task)
        raw = explained.raw
        values = at_positions(maps.detach().to(raw.device), raw)
        counted = _counted(explained, values)
        rank = rank_positions(values.flatten(1), counted.flatten(1), explained.seeds()).view_as(values)
        positions = counted.flatten(1).sum(1, keepdim=True)
        counts = (positions * torch.arange(steps + 1, device=raw.device) / steps).round()
        # Padding is the same at both ends of the curve.
        empty = torch.where(counted, baseline_like(baseline, raw), raw)
        before, after = (empty, raw) if inserting else (raw, empty)
        curve = torch.empty(counts.shape, dtype=torch.float64)
        for rows, points in batches_of_variants(explained.n, steps + 1, batch_size, target, raw.device):
            turned = rank[rows] < counts[rows, points].reshape(-1, *[1] * (values.ndim - 1))
            mixed = torch.where(turned, after[rows], before[rows])
            scores = select(explained.outputs_of(mixed, rows), of_rows(target, rows), score)
            curve[rows.cpu(), points.cpu()] = scores.to(curve)
        finite = all_finite(values.masked_fill(~counted, 0))
    return counts.to(curve) / positions.to(curve), curve.masked_fill(~finite[:, None].cpu(), torch.nan)


def _counted(explained: ExplainedInput, values: Tensor) -> Bool[Tensor, "n *broadcastable"]:
    """Return which positions count: of tokens, those that the task's mask keeps."""
    mask = explained.task.mask(explained.inputs) if explained.tokens else None
    if mask is None or mask.shape != values.shape:
        return torch.ones_like(values, dtype=torch.bool)
    return mask.bool().to(values.device)
