"""Influence along the path of training: dot products of gradients at its checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_interp.influence.checkpoints import Checkpoint, check_checkpoints, loaded
from lightning_interp.influence.curvature import IdentityCurvature
from lightning_interp.influence.ensemble import combined, top_of
from lightning_interp.influence.estimator import InfluenceFunction
from lightning_interp.progress import Progress, quiet
from lightning_interp.records import Influence
from lightning_interp.samples import both
from lightning_interp.task import Task


@dataclass(frozen=True)
class TracIn:
    """By how much steps on a training sample lowered a query's loss, to first order, at checkpoints of the run.

    scores[q, i] = Σ_c η_c ∇ℓ_q(θ_c) · ∇ℓ_i(θ_c), without a unit. Positive is helpful. It needs no optimum, but knows
    nothing of the curvature: the order of its scores follows retraining much less than an `InfluenceFunction`'s does.

    Reference: Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent, 2020 (TracInCP).

    Args:
        checkpoints: weights during the run (see `lightning_interp.influence.checkpoints.loaded`); the model's own do
            not enter.
        learning_rates: η of each checkpoint, or one for all.
        layers: names or glob patterns of the layers whose parameters enter; all that are covered when None.
    """

    checkpoints: Sequence[Checkpoint] = dataclasses.field(repr=False)
    learning_rates: Sequence[float] | float = 1.0
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_checkpoints("TracIn(checkpoints=...)", self.checkpoints)
        rates = self._rates
        if len(rates) != len(self.checkpoints) or not all(0 <= rate < float("inf") for rate in rates) or not any(rates):
            raise ValueError(
                "TracIn(learning_rates=...): expected a number, or one for each of the"
                f" {len(self.checkpoints)} checkpoints, not negative and not all zero, got {self.learning_rates!r}"
            )

    def __call__(
        self,
        model: nn.Module,
        train: Any,
        query: Any,
        task: Task = Task(),
        candidates: Sequence[int] | None = None,
        top_k: int | None = None,
        progress: Progress = quiet,
    ) -> Influence:
        """Score training samples for each query; the model's weights are as they were afterwards.

        Args:
            model: any module that the checkpoints fit; it runs in eval mode.
            train: training dataset (or a loader, read in dataset order).
            query: dataset or loader of the samples whose losses are asked about.
            task: how to read batches, call the model, and its loss per sample.
            candidates: places in `train` to score; all when None.
            top_k: return only so many of each query's most helpful, harmful and surprisingly helpful samples; all
                scores are held while they are summed.
            progress: shows how far it got.

        Raises:
            ValueError: a dataset is empty, no parameter is covered, or a checkpoint does not fit the model.
            FloatingPointError: gradients or scores are not finite.
        """
        samples, asked = both(train, query)
        dots = InfluenceFunction(IdentityCurvature(), 1.0, self.layers)

        def scored() -> Iterator[Influence]:
            with loaded(model, self.checkpoints[0]):
                fitted = dots.fit(model, samples, task, progress)
            for checkpoint in self.checkpoints:
                with loaded(model, checkpoint):
                    yield fitted(asked, candidates)

        found = combined(scored(), [rate * len(samples) for rate in self._rates])
        method = f"TracIn, {len(self.checkpoints)} checkpoints"
        return top_of(dataclasses.replace(found, method=method), top_k)

    @property
    def _rates(self) -> Sequence[float]:
        rates = self.learning_rates
        return [rates] * len(self.checkpoints) if isinstance(rates, (int, float)) else rates
