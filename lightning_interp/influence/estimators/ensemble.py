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
        checkpoints: the weights (see `lightning_interp.influence.checkpoints.loaded`); the model's own do not enter.
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
            query: dataset or loader of the samples whose losses are asked about.
            task: how to read batches, call the model, and its loss per sample.
            candidates: places in `train` to score; all when None.
            top_k: return only so many of each query's most helpful, harmful and surprisingly helpful samples. All
                scores are held while they are summed: to hold what is fitted to each set of weights, or to fit it anew
                for each chunk of samples, would cost more.
            progress: shows how far it got.

        Raises:
            ValueError: a checkpoint does not fit the model.
        """

        def scored() -> Iterator[Influence]:
            for checkpoint in self.checkpoints:
                with loaded(model, checkpoint):
                    yield self.estimator(model, train, query, task, candidates, None, progress)

        share = 1 / len(self.checkpoints)
        found = combined(scored(), [share] * len(self.checkpoints))
        method = f"mean over {len(self.checkpoints)} checkpoints, {found.method}"
        return top_of(dataclasses.replace(found, method=method), top_k)


def combined(found: Iterable[Influence], weights: Sequence[float]) -> Influence:
    """Return the weighted sum of several scores of the same samples, one held at a time.

    Losses and the norm of the mean gradient are means over them; the damping is theirs where they agree, else NaN,
    and said in a note.
    """
    parts = zip(found, weights, strict=True)
    first, weight = next(parts)
    scores, losses, norm = first.scores * weight, first.query_losses, first.gradient_norm
    dampings, notes = [first.damping], list(first.notes)
    for part, weight in parts:
        scores = scores.add_(part.scores, alpha=weight)
        losses, norm = losses + part.query_losses, norm + part.gradient_norm
        dampings.append(part.damping)
        notes += [note for note in part.notes if note not in notes]
    same = len(set(dampings)) == 1 or isnan(first.damping)
    if not same:
        notes.append(f"damping: {min(dampings):.3g} to {max(dampings):.3g}, each set of weights its own")
    return dataclasses.replace(
        first,
        scores=scores,
        query_losses=losses / len(weights),
        gradient_norm=norm / len(weights),
        damping=first.damping if same else nan,
        notes=tuple(notes),
        mean=None,
        agreement={},
    )


def top_of(found: Influence, top_k: int | None) -> Influence:
    """Return only the columns of each query's most helpful, harmful and surprisingly helpful samples; all when None.

    Raises:
        ValueError: `top_k` is below 1.
    """
    if top_k is None:
        return found
    if top_k < 1:
        raise ValueError(f"top_k: expected a number from 1, got {top_k}")
    top = TopScores(top_k, found.query_targets)
    top.add(found.scores, found.train_targets)
    kept = top.kept()
    return dataclasses.replace(
        found,
        scores=kept.scores,
        train_ids=found.train_ids[kept.places],
        train_targets=kept.targets,
        places=found.columns[kept.places],
        scored=found.n_scored,
        mean=found.scores.mean(1),
    )
