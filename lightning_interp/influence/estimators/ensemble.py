"""Influence averaged over several weights of one network: checkpoints of a run, or runs from several seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any, Protocol, runtime_checkable

from torch import nn

from lightning_interp.data.task import Task
from lightning_interp.influence.results import Influence
from lightning_interp.influence.scores.top_k import TopScores
from lightning_interp.network.weights import Checkpoint, check_checkpoints, loaded
from lightning_interp.progress import Progress, quiet


@runtime_checkable
class Estimator(Protocol):
    """Scores training samples for queries; `InfluenceFunction`, `TracIn` and `TRAK` are such."""

    def __call__(
        self,
        model: nn.Module,
        train: Any,
        query: Any,
        task: Task = ...,
        candidates: Sequence[int] | None = ...,
        top_k: int | None = ...,
        progress: Progress = ...,
    ) -> Influence:
        """Return the scores."""


@dataclass(frozen=True)
class Ensemble:
    """Mean of an estimator's scores over several weights of one network.

    scores = (1/M) Σ_m scores_m: what one run of training left to chance averages out, so that the mean follows
    retraining, which is random too, better than each. It costs M times as much.

    Reference: Søgaard et al., Revisiting Methods for Finding Influential Examples, 2021; Park et al., TRAK, 2023.

    Args:
        estimator: scores with one set of weights.
        checkpoints: the weights (see `lightning_interp.network.weights.loaded`); the model's own do not enter.
    """

    estimator: Estimator
    checkpoints: Sequence[Checkpoint] = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        check_checkpoints("Ensemble(checkpoints=...)", self.checkpoints)

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
            model: any module that the checkpoints fit.
            train: training dataset (or a loader, read in dataset order).
            query: dataset or loader of the samples whose losses are explained.
            task: how to read batches, call the model, and its loss per sample.
            candidates: indices in `train` to score; all when None.
            top_k: return only so many of each query's most helpful, harmful and surprisingly helpful samples. All
                scores are in memory while they are summed: to keep what is fitted to each set of weights there, or to
                fit it anew for each chunk of samples, would cost more.
            progress: shows how far it got.

        Raises:
            ValueError: a checkpoint does not fit the model.
        """

        def scored() -> Iterator[Influence]:
            for checkpoint in self.checkpoints:
                with loaded(model, checkpoint):
                    yield self.estimator(model, train, query, task, candidates, None, progress)

        share = 1 / len(self.checkpoints)
        influence = combine(scored(), [share] * len(self.checkpoints))
        method = f"mean over {len(self.checkpoints)} checkpoints, {influence.method}"
        return only_top(dataclasses.replace(influence, method=method), top_k)


def combine(influences: Iterable[Influence], weights: Sequence[float]) -> Influence:
    """Return the weighted sum of several scores of the same samples, one in memory at a time.

    Losses and the norm of the mean gradient are means over them; the damping is theirs where they agree, else NaN,
    with a note of its range.
    """
    pairs = zip(influences, weights, strict=True)
    first, weight = next(pairs)
    scores, losses, norm = first.scores * weight, first.query_losses, first.gradient_norm
    dampings, notes = [first.damping], list(first.notes)
    for influence, weight in pairs:
        scores = scores.add_(influence.scores, alpha=weight)
        losses, norm = losses + influence.query_losses, norm + influence.gradient_norm
        dampings.append(influence.damping)
        notes += [note for note in influence.notes if note not in notes]
    agree = len(set(dampings)) == 1 or isnan(first.damping)
    if not agree:
        notes.append(f"damping: {min(dampings):.3g} to {max(dampings):.3g}, each set of weights its own")
    return dataclasses.replace(
        first,
        scores=scores,
        query_losses=losses / len(weights),
        gradient_norm=norm / len(weights),
        damping=first.damping if agree else nan,
        notes=tuple(notes),
        mean=None,
        agreement={},
    )


def only_top(influence: Influence, top_k: int | None) -> Influence:
    """Return only the columns of each query's most helpful, harmful and surprisingly helpful samples; all when None.

    Raises:
        ValueError: `top_k` is below 1.
    """
    if top_k is None:
        return influence
    if top_k < 1:
        raise ValueError(f"top_k: expected a number from 1, got {top_k}")
    top = TopScores(top_k, influence.query_targets)
    top.add(influence.scores, influence.train_targets)
    columns = top.columns()
    return dataclasses.replace(
        influence,
        scores=columns.scores,
        train_ids=influence.train_ids[columns.positions],
        train_targets=columns.targets,
        places=influence.columns[columns.positions],
        scored=influence.n_scored,
        mean=influence.scores.mean(1),
    )
