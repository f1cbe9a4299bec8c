"""What is kept of a stream of scores: all of them, in memory or in a file, or each query's top alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


class ScoreColumns(NamedTuple):
    """Columns of scores.

    Args:
        scores: `(q, m)`.
        places: of the columns among all scored samples, `(m,)`.
        targets: of the columns' samples, `(m, ...)`.
    """

    scores: Float[Tensor, "q m"]
    places: Int[Tensor, " m"]
    targets: Tensor

    def at(self, places: Sequence[int]) -> ScoreColumns:
        """Return the same columns, their places being places among `places`."""
        return self._replace(places=torch.tensor(places)[self.places])


@runtime_checkable
class ScoreKeeper(Protocol):
    """Takes scores as they come."""

    def add(self, scores: Tensor, targets: Tensor) -> None:
        """Take the scores `(q, b)` and targets `(b, ...)` of the next samples."""

    def kept(self) -> ScoreColumns:
        """Return what was kept."""


class AllScores:
    """Keeps all scores, in memory or, as they come, in a `.npy` file that is mapped into memory.

    Args:
        queries: number of rows.
        samples: number of columns.
        path: of the file; None for memory.
    """

    def __init__(self, queries: int, samples: int, path: Path | None = None) -> None:
        self._shape, self._path = (queries, samples), path
        self._scores: Tensor | None = None
        self._targets: list[Tensor] = []
        self._filled = 0

    def add(self, scores: Tensor, targets: Tensor) -> None:
        """Write the next columns."""
        if self._scores is None:
            self._scores = self._room(scores)
        stop = self._filled + scores.shape[1]
        self._scores[:, self._filled : stop] = scores
        self._filled = stop
        self._targets.append(targets)

    def kept(self) -> ScoreColumns:
        """Return all columns."""
        if self._scores is None:
            raise ValueError("train: expected samples to score, got none")
        return ScoreColumns(self._scores, torch.arange(self._filled), torch.cat(self._targets))

    def _room(self, like: Tensor) -> Tensor:
        if self._path is None:
            return like.new_empty(self._shape)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        held = np.lib.format.open_memmap(self._path, mode="w+", dtype=like.cpu().numpy().dtype, shape=self._shape)
        return torch.from_numpy(held)


class TopScores:
    """Keeps the columns of samples that are among the `k` most helpful, harmful or surprising of any query.

    Memory grows with queries · k, not with the number of samples.

    Args:
        k: how many of each list.
        query_targets: `(q, ...)`; where they are classes, the most helpful of another class are kept as well.
    """

    def __init__(self, k: int, query_targets: Tensor) -> None:
        self._k, self._queries = k, query_targets
        self._held: ScoreColumns | None = None
        self._seen = 0

    def add(self, scores: Tensor, targets: Tensor) -> None:
        """Take the next columns in, and drop what has fallen out of every list."""
        fresh = ScoreColumns(scores, torch.arange(self._seen, self._seen + scores.shape[1]), targets)
        self._seen += scores.shape[1]
        held = fresh if self._held is None else merged([self._held, fresh])
        wanted = self._wanted(held)
        self._held = ScoreColumns(held.scores[:, wanted], held.places[wanted], held.targets[wanted])

    def kept(self) -> ScoreColumns:
        """Return the columns, in the order of their places."""
        if self._held is None:
            raise ValueError("train: expected samples to score, got none")
        return self._held

    def _wanted(self, held: ScoreColumns) -> Tensor:
        lists = [held.scores, -held.scores]
        if held.targets.ndim == 1 and self._queries.ndim == 1 and not held.targets.is_floating_point():
            same = held.targets[None, :] == self._queries[:, None]
            lists.append(held.scores.masked_fill(same, -torch.inf))
        k = min(self._k, held.scores.shape[1])
        return torch.cat([scores.topk(k, dim=1).indices.flatten() for scores in lists]).unique()


def merged(parts: Sequence[ScoreColumns]) -> ScoreColumns:
    """Return the columns of all parts, in the order of their places."""
    if len(parts) == 1:
        return parts[0]
    whole = ScoreColumns(
        torch.cat([part.scores for part in parts], dim=1),
        torch.cat([part.places for part in parts]),
        torch.cat([part.targets for part in parts]),
    )
    order = whole.places.argsort()
    return ScoreColumns(whole.scores[:, order], whole.places[order], whole.targets[order])


def overlap(left: ScoreColumns, right: ScoreColumns, k: int) -> float:
    """Return the share of each query's `k` most helpful and `k` most harmful that both hold, mean over queries."""
    shares = []
    for sign in (1, -1):
        for mine, theirs in zip(sign * left.scores, sign * right.scores, strict=True):
            first, second = (
                set(kept.places[row.topk(min(k, len(row))).indices].tolist())
                for kept, row in ((left, mine), (right, theirs))
            )
            shares.append(len(first & second) / max(1, min(k, len(first))))
    return sum(shares) / len(shares)
