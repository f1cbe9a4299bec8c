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

CHUNK_SAMPLES = 4096  # that each checkpoint is loaded for: 16 KB of float32 scores a query

ScoredBatch = tuple[Tensor, Tensor]
BatchScorer = Callable[[int, Samples], Iterable[ScoredBatch]]


class CollectedScores(NamedTuple):
    """The columns that were kept of all scores, and the mean over all of them.

    Args:
        columns: that were kept.
        mean: mean score of each query over all samples, `(q,)`.
        n: number of samples that were scored.
    """

    columns: ScoreColumns
    mean: Float[Tensor, " q"]
    n: int


def samples_to_score(train: Samples, candidates: Sequence[int] | None) -> Samples:
    """Return the training samples to score; all when `candidates` is None.

    Raises:
        ValueError: there are none.
    """
    samples = train if candidates is None else train.at(candidates)
    if not len(samples):
        raise ValueError("candidates: expected training samples to score, got none")
    return samples


def sample_chunks(samples: Samples, top_k: int | None) -> Iterator[Samples]:
    """Return whole batches, about 4,096 samples at a time; all at once where all scores are kept anyway.

    Raises:
        ValueError: `top_k` is below 1.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected a number from 1, got {top_k}")
    n, batch = len(samples), samples.batch_size
    step = -(-CHUNK_SAMPLES // batch) * batch
    if top_k is None or n <= step:
        return iter([samples])
    return (samples.at(range(start, min(n, start + step))) for start in range(0, n, step))


def summed_over_checkpoints(
    model: nn.Module, weights: Sequence[Checkpoint | None], chunks: Iterable[Samples], score: BatchScorer
) -> Iterator[ScoredBatch]:
    """Yield each chunk's scores `(q, b)`, summed over the weights, and targets `(b, ...)`: q · b numbers are in memory.

    Args:
        model: gets the weights in turn, once for each chunk.
        weights: None are the model's own.
        chunks: of samples.
        score: index among the weights, samples → their scores and targets, batch by batch.
    """
    for chunk in chunks:
        total: Tensor | None = None
        for index in range(len(weights)):
            with using_checkpoint(model, weights[index]):
                batch_scores, targets = zip(*score(index, chunk), strict=True)
            scores = torch.cat(batch_scores, dim=1)
            total = scores if total is None else total.add_(scores)
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
    return CollectedScores(keeper.columns(), torch.as_tensor(total) / samples, samples)


def without_unit(
    collected: CollectedScores, scored: Samples, train: Samples, coverage: Coverage, **facts: Any
) -> Influence:
    """Return the record of scores of which only the order means something.

    The norm of the mean gradient is NaN: it would take a gradient in memory for each set of weights, and these scores
    expect no optimum.
    """
    columns = collected.columns
    subset = len(columns.positions) < len(scored)
    notes = facts.pop("notes", ())
    if len(scored) < len(train):
        note = f"{len(scored):,} of {len(train):,} training samples were scored; the others are not in the ranking"
        notes = (note, *notes)
    return Influence(
        scores=columns.scores,
        train_ids=torch.tensor((scored.at(columns.positions.tolist()) if subset else scored).ids),
        train_targets=columns.targets,
        covered=tuple(coverage.parameter_sizes),
        left_out=coverage.left_out,
        covered_elements=coverage.size,
        gradient_norm=nan,
        notes=notes,
        unit="none",
        places=columns.positions,
        scored=collected.n,
        mean=collected.mean,
        **facts,
    )


@contextlib.contextmanager
def using_checkpoint(model: nn.Module, checkpoint: Checkpoint | None) -> Iterator[None]:
    """Load a checkpoint's weights within the context, none when None, with gradients on."""
    with contextlib.nullcontext() if checkpoint is None else loaded(model, checkpoint), differentiable(model):
        yield
