"""Integrated gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.attribution.engine.batching import batches_of_variants, of_rows
from lightning_interp.attribution.engine.explained_input import ExplainedInput, gradients
from lightning_interp.attribution.engine.target import Score, Target, logit, recorded, select
from lightning_interp.attribution.perturbed.baseline import Baseline, baseline_like
from lightning_interp.attribution.results import Explanation
from lightning_interp.attribution.saliency import suffix
from lightning_interp.checks import check_count
from lightning_interp.data.batch import at_least_float32
from lightning_interp.data.task import Task
from lightning_interp.network.undisturbed import explaining


@dataclass(frozen=True)
class IntegratedGradients:
    """Gradients integrated along the straight line from a baseline to the input.

    map = (x − x′) ⊙ ∫₀¹ ∂ logit_target / ∂x at x′ + α (x − x′) dα, by the midpoint rule, α = (k + ½) / steps; signed,
    in the shape of x; for token ids between embeddings, summed over their dimensions, `(n, tokens)`. Its sum is
    logit(x) − logit(x′) up to the rule's error, which is `facts["completeness_gap"]` (sum minus difference, in the
    score's unit): where it is not small beside the difference, take more steps. It depends on the baseline: what equals
    it gets 0.

    Reference: Sundararajan et al., Axiomatic Attribution for Deep Networks, 2017.

    Args:
        steps: points on that line.
        baseline: x′: a number, one per channel, a tensor in the shape of one sample (of token ids: of its embedding),
            or a function of x.
        score: what is differentiated: `logit`, `probability`, `log_probability`, or a function like them.
        batch_size: points at a time.
    """

    steps: int = 32
    baseline: Baseline = 0.0
    score: Score = logit
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_count("IntegratedGradients", "steps", self.steps)
        check_count("IntegratedGradients", "batch_size", self.batch_size)

    @property
    def name(self) -> str:
        """Tag of the method."""
        return "IntegratedGradients" + ("" if self.steps == 32 else f"_{self.steps}_steps") + suffix(self.score)

    def __call__(self, model: nn.Module, inputs: Any, target: Target, task: Task = Task()) -> Explanation:
        """Explain each sample of a batch by itself; the model is left as it was.

        Args:
            model: any module; it runs in eval mode.
            inputs: what `task.outputs(model, ...)` takes, on the model's device.
            target: class per sample `(n,)`, or a function outputs → `(n,)`.
            task: how to call the model.

        Raises:
            ValueError: the target or the baseline does not fit, or no gradient flows.
        """
        with explaining(model):
            explained = ExplainedInput(model, inputs, task)
            start = baseline_like(self.baseline, explained.values)
            way = explained.values - start
            maps = at_least_float32(way) * self._mean_gradient(explained, start, way, target)
            rise = self._scores(explained, explained.values, target) - self._scores(explained, start, target)
        gap = maps.flatten(1).sum(1) - rise
        maps = maps.sum(-1) if explained.tokens else maps
        return Explanation(
            self.name, maps.cpu(), recorded(target, len(maps)), facts={"completeness_gap": gap.float().cpu()}
        )

    def _mean_gradient(self, explained: ExplainedInput, start: Tensor, way: Tensor, target: Target) -> Tensor:
        total = torch.zeros_like(at_least_float32(way))
        for rows, steps in batches_of_variants(explained.n, self.steps, self.batch_size, target, way.device):
            share = ((steps + 0.5) / self.steps).to(way.dtype).reshape(-1, *[1] * (way.ndim - 1))
            point = (start[rows] + share * way[rows]).requires_grad_()
            scores = select(explained.outputs(point.clone(), rows), of_rows(target, rows), self.score)
            (gradient,) = gradients(scores, [point])
            total.index_add_(0, rows, gradient.to(total.dtype))
        return total / self.steps

    def _scores(self, explained: ExplainedInput, values: Tensor, target: Target) -> Tensor:
        with torch.no_grad():
            return at_least_float32(select(explained.outputs(values.clone()), target, self.score))
