"""Scores summed over several sets of weights, a chunk of the training samples at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import nan
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_interp.data.samples import Samples
from lightning_interp.influence.gradients.coverage import Coverage
from lightning_interp.influence.results import Influence
from lightning_interp.influence.scores.top_k import AllScores, ScoreColumns, TopScores
from lightning_interp.network.undisturbed import differentiable
from lightning_interp.network.weights import Checkpoint, loaded

SAMPLES_AT_ONCE = 4096

ScoredBatch = tuple[Tensor, Tensor]
BatchScorer = Callable[[int, Samples], Iterable[ScoredBatch]]


class CollectedScores(NamedTuple):
    """What is kept of a stream of scores, and what all of them come to.

    Args:
        kept: columns.
        mean: mean score of each query over all samples, `(q,)`.
        n: number of samples that went by.
    """

    kept: ScoreColumns
    mean: Float[Tensor, " q"]
    n: int


def samples_to_score(train: Samples, candidates: Sequence[int] | None) -> Samples:
    """Return the training samples to score; all when `candidates` is None.

    Raises:
        ValueError: there are none.
    """
    chosen = train if candidates is None else train.at(candidates)
    if not len(chosen):
        raise ValueError("candidates: expected training samples to score, got none")
    return chosen


def sample_chunks(samples: Samples, top_k: int | None) -> Iterator[Samples]:
    """Return whole batches, about 4,096 samples at a time; all at once where all scores are kept anyway.

    Raises:
        ValueError: `top_k` is below 1.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected a number from 1, got {top_k}")
    n, batch = len(samples), samples.batch_size
    step = -(-SAMPLES_AT_ONCE // batch) * batch
    if top_k is None or n <= step:
        return iter([samples])
    return (samples.at(range(start, min(n, start + step))) for start in range(0, n, step))


def summed_over_checkpoints(
    model: nn.Module, weights: Sequence[Checkpoint | None], parts: Iterable[Samples], scored: BatchScorer
) -> Iterator[ScoredBatch]:
    """Yield each chunk's scores `(q, b)`, summed over the weights, and targets `(b, ...)`: q · b numbers are held.

    Args:
        model: gets the weights in turn, once for each chunk.
        weights: None are the model's own.
        parts: chunks of samples.
        scored: place among the weights, samples → their scores and targets, batch by batch.
    """
    for part in parts:
        total: Tensor | None = None
        for place in range(len(weights)):
            with using_checkpoint(model, weights[place]):
                scores, targets = zip(*scored(place, part), strict=True)
            one = torch.cat(scores, dim=1)
            total = one if total is None else total.add_(one)
        if total is not None:
            yield total, torch.cat(targets)


def collect_scores(
    columns: Iterable[ScoredBatch], query_targets: Tensor, samples: int, top_k: int | None
) -> CollectedScores:
    """Keep each query's top of a stream of scores; all of them when `top_k` is None.

    Args:
        columns: scores `(q, b)` and targets `(b, ...)`.
        query_targets: `(q, ...)`.
        samples: how many there are in all.
        top_k: how many of each of a query's lists.
    """
    keeper = AllScores(len(query_targets), samples) if top_k is None else TopScores(top_k, query_targets)
    total: Tensor | float = 0.0
    for scores, targets in columns:
        keeper.add(scores, targets)
        total = total + scores.sum(1)
    return CollectedScores(keeper.kept(), torch.as_tensor(total) / samples, samples)


def without_unit(
    found: CollectedScores, chosen: Samples, train: Samples, coverage: Coverage, **facts: Any
) -> Influence:
    """Return the record of scores of which only the order means something.

    The norm of the mean gradient is NaN: it would take a gradient held for each set of weights, and these scores expect
    no optimum.
    """
    places = found.kept.places
    few = len(places) < len(chosen)
    notes = facts.pop("notes", ())
    if len(chosen) < len(train):
        some = f"{len(chosen):,} of {len(train):,} training samples were scored; the others are not in the ranking"
        notes = (some, *notes)
    return Influence(
        scores=found.kept.scores,
        train_ids=torch.tensor((chosen.at(places.tolist()) if few else chosen).ids),
        train_targets=found.kept.targets,
        covered=tuple(coverage.parameter_sizes),
        left_out=coverage.left_out,
        covered_elements=coverage.size,
        gradient_norm=nan,
        notes=notes,
        unit="none",
        places=places,
        scored=found.n,
        mean=found.mean,
        **facts,
    )


@contextlib.contextmanager
def using_checkpoint(model: nn.Module, checkpoint: Checkpoint | None) -> Iterator[None]:
    """Give a network a checkpoint's weights for a while, its own when None, with gradients on."""
    with contextlib.nullcontext() if checkpoint is None else loaded(model, checkpoint), differentiable(model):
        yield
