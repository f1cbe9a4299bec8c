"""Influence along the path of training: dot products of gradients at its checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

from torch import Tensor, nn

from lightning_interp.data.samples import Samples, train_and_query_samples
from lightning_interp.data.task import Task
from lightning_interp.influence.curvature import IdentityCurvature
from lightning_interp.influence.curvature.curvature import sum_of
from lightning_interp.influence.estimators.fitted import FittedInfluence, check_finite, query_gradients
from lightning_interp.influence.estimators.influence_function import InfluenceFunction
from lightning_interp.influence.results import Influence
from lightning_interp.influence.scores.over_checkpoints import (
    ScoredBatch,
    collect_scores,
    sample_chunks,
    samples_to_score,
    summed_over_checkpoints,
    without_unit,
)
from lightning_interp.network.weights import Checkpoint, check_checkpoints, loaded
from lightning_interp.progress import Progress, quiet


@dataclass(frozen=True)
class TracIn:
    """By how much steps on a training sample lowered a query's loss, to first order, at checkpoints of the run.

    scores[q, i] = Σ_c η_c ∇ℓ_q(θ_c) · ∇ℓ_i(θ_c), without a unit. Positive is helpful. It needs no optimum, but knows
    nothing of the curvature: the order of its scores follows retraining much less than an `InfluenceFunction`'s does.
    The norm of the mean gradient is not taken: NaN.

    Reference: Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent, 2020 (TracInCP).

    Args:
        checkpoints: weights during the run (see `lightning_interp.network.weights.loaded`); the model's own do
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
            query: dataset or loader of the samples whose losses are explained.
            task: how to read batches, call the model, and its loss per sample.
            candidates: indices in `train` to score; all when None.
            top_k: return only so many of each query's most helpful, harmful and surprisingly helpful samples: memory
                then does not grow with `train`, and each checkpoint is read once for about 4,096 samples.
            progress: shows how far it got.

        Raises:
            ValueError: a dataset is empty, no parameter is covered, or a checkpoint does not fit the model.
            FloatingPointError: gradients or scores are not finite.
        """
        samples, queries = train_and_query_samples(train, query)
        # Coverage is checked with weights of the run; it holds for the other checkpoints as well.
        with loaded(model, self.checkpoints[0]):
            fitted = InfluenceFunction(IdentityCurvature(), 1.0, self.layers).fit(model, samples, task, progress)
        scored = samples_to_score(fitted.train, candidates)
        runs = _CheckpointScores(fitted, fitted.reader.rebatch(queries), self._rates)
        columns = summed_over_checkpoints(model, self.checkpoints, sample_chunks(scored, top_k), runs)
        first = next(columns)  # the queries' targets and losses are known only after it
        return without_unit(
            collect_scores(itertools.chain([first], columns), runs.targets[0], len(scored), top_k),
            scored,
            fitted.train,
            fitted.coverage,
            query_targets=runs.targets[0],
            query_losses=sum_of(runs.losses.values()) / len(self.checkpoints),
            method=f"TracIn, {len(self.checkpoints)} checkpoints",
            damping=nan,
            curvature_n=fitted.fitted.n,
            notes=fitted.notes,
        )

    @property
    def _rates(self) -> Sequence[float]:
        rates = self.learning_rates
        return rates if isinstance(rates, Sequence) else [float(rates)] * len(self.checkpoints)


@dataclass(frozen=True, eq=False)
class _CheckpointScores:
    """Scores by each checkpoint; the queries' gradients are taken anew for each chunk, to hold those of one checkpoint.

    Args:
        fitted: the network, in which the weights change.
        query: the queries.
        rates: of the checkpoints.
        targets: of the queries, by the checkpoint's index.
        losses: of the queries, by the checkpoint's index.
    """

    fitted: FittedInfluence
    query: Samples
    rates: Sequence[float]
    targets: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    losses: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def __call__(self, index: int, chunk: Samples) -> Iterator[ScoredBatch]:
        """Yield scores and targets of samples, batch by batch."""
        queries = query_gradients(self.fitted.reader, self.query)
        self.targets[index], self.losses[index] = queries.targets, queries.losses
        scorer = self.fitted.inverse.against(queries.gradients)
        for batch in self.fitted.reader.per_sample_gradients(chunk, "scoring training samples"):
            scores = check_finite(scorer(batch.loss_gradients()), "scores").cpu()
            yield scores * self.rates[index], batch.targets.detach().cpu()
