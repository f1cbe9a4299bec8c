"""KernelSHAP: Shapley values by weighted least squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lightning_interp.attribution.engine.target import Score, Target, logit, recorded
from lightning_interp.attribution.perturbed.baseline import Baseline
from lightning_interp.attribution.perturbed.coalitions import countable, shapley, shapley_kernel
from lightning_interp.attribution.perturbed.linear_models import LocalModel, with_fixed_sum
from lightning_interp.attribution.perturbed.local_models import LocalModels, local_models
from lightning_interp.attribution.perturbed.queries import score_coalitions
from lightning_interp.attribution.perturbed.regions import Regions, regions_tag
from lightning_interp.attribution.results import Explanation
from lightning_interp.attribution.saliency import suffix
from lightning_interp.checks import check_count
from lightning_interp.data.task import Task


@dataclass(frozen=True)
class KernelSHAP:
    """Shapley values of an input's parts: the mean gain in the target's logit when a part joins, over all orders.

    φ = argmin Σ_z w(z) (logit_target(x with just the parts z) − logit_target(baseline) − zᵀφ)² over coalitions z of the
    M parts, s of them on, w = (M − 1) / (C(M, s) · s · (M − s)), under Σ φ = logit_target(x) − logit_target(baseline),
    which holds exactly. Where M parts have at most `samples` coalitions, all are evaluated and φ is exact (10 parts at
    the default); else coalitions are drawn by the kernel, in pairs of opposites, seeded by the sample itself: the
    same in every batch, epoch and run. Maps as for LIME: `(n, columns)` for tables, `(n, tokens)`, `(n, H, W)`; signed.

    Parts that are off take one baseline. Shapley values over a set of background rows are the mean of the maps over
    them. Where columns depend on each other, coalitions contain rows that do not occur.

    Reference: Lundberg and Lee, A unified approach to interpreting model predictions, 2017.

    Args:
        samples: coalitions at most, not counting the empty and the full one.
        parts: sample → the part (a whole number) at each position, below 0 where nothing is ever switched off; chosen
            as for LIME when None.
        baseline: what replaces a part that is off: a number (of token ids, the mask or padding token), one per channel
            or column (of tables, say, the training set's mean), a tensor in the shape of one sample, or a function of
            the inputs.
        score: what is explained: `logit`, `probability`, `log_probability`, or a function like them.
        batch_size: perturbed copies at a time.
    """

    samples: int = 1024
    parts: Regions | None = None
    baseline: Baseline = 0.0
    score: Score = logit
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_count("KernelSHAP", "samples", self.samples, 2)
        check_count("KernelSHAP", "batch_size", self.batch_size)

    @property
    def name(self) -> str:
        """Tag of the method."""
        return "KernelSHAP" + suffix(self.score) + regions_tag(self.parts)

    def __call__(self, model: nn.Module, inputs: Any, target: Target, task: Task = Task()) -> Explanation:
        """Explain each sample of a batch by itself; the model is left as it was.

        Args:
            model: any module; it runs in eval mode.
            inputs: what `task.outputs(model, ...)` takes, on the model's device.
            target: class per sample `(n,)`, or a function outputs → `(n,)`.
            task: how to call the model.

        Raises:
            ValueError: the target, the parts or the baseline do not fit, or the samples are too few for the parts.
        """
        scored = score_coalitions(self, model, inputs, target, task)
        return local_models(self, scored).of_target(recorded(target, len(scored.labels)))

    def all_classes(self, model: nn.Module, inputs: Any, task: Task = Task()) -> LocalModels:
        """Find every class's values from one set of forwards; `.of(target)` gives the maps of a class per sample."""
        return local_models(self, score_coalitions(self, model, inputs, None, task))

    def coalitions(self, n_parts: int, generator: Generator) -> Tensor:
        """Return the full and the empty coalition, and those drawn."""
        ends = torch.tensor([[True], [False]]).expand(2, n_parts)
        return torch.cat([ends, shapley(n_parts, self.samples, generator)])

    def fit(self, coalitions: Tensor, scores: Tensor) -> LocalModel:
        """Return one sample's values of each column of scores."""
        full, none = scores[:2].double()
        inner, n_parts = coalitions[2:], coalitions.shape[1]
        exact = countable(n_parts, self.samples)
        weights = shapley_kernel(inner) if exact else torch.ones(len(inner), dtype=torch.float64)
        return with_fixed_sum(inner, scores[2:], weights, none, full - none)
