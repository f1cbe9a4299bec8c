"""Scores collected batch by batch: all of them, in memory or in a file, or each query's strongest columns alone."""

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
        positions: of the columns among all scored samples, `(m,)`.
        targets: of the columns' samples, `(m, ...)`.
    """

    scores: Float[Tensor, "q m"]
    positions: Int[Tensor, " m"]
    targets: Tensor

    def at(self, positions: Sequence[int]) -> ScoreColumns:
        """Return these columns of a subset with their positions in the whole.

        Args:
            positions: of the subset's samples in the whole.
        """
        return self._replace(positions=torch.tensor(positions)[self.positions])


@runtime_checkable
class ScoreKeeper(Protocol):
    """Collects scores batch by batch."""

    def add(self, scores: Tensor, targets: Tensor) -> None:
        """Take the scores `(q, b)` and targets `(b, ...)` of the next samples."""

    def columns(self) -> ScoreColumns:
        """Return the columns that were kept, in the order of their positions."""


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
            self._scores = self._allocate(scores)
        stop = self._filled + scores.shape[1]
        self._scores[:, self._filled : stop] = scores
        self._filled = stop
        self._targets.append(targets)

    def columns(self) -> ScoreColumns:
        """Return all columns."""
        if self._scores is None:
            raise ValueError("train: expected samples to score, got none")
        return ScoreColumns(self._scores, torch.arange(self._filled), torch.cat(self._targets))

    def _allocate(self, like: Tensor) -> Tensor:
        if self._path is None:
            return like.new_empty(self._shape)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = np.lib.format.open_memmap(self._path, mode="w+", dtype=like.cpu().numpy().dtype, shape=self._shape)
        return torch.from_numpy(file)


class TopScores:
    """Keeps the columns of samples that are among the `k` most helpful, harmful or surprising of any query.

    Memory grows with queries · k, not with the number of samples.

    Args:
        k: how many of each list.
        query_targets: `(q, ...)`; where they are classes, the most helpful of another class are a list as well.
    """

    def __init__(self, k: int, query_targets: Tensor) -> None:
        self._k, self._query_targets = k, query_targets
        self._columns: ScoreColumns | None = None
        self._count = 0

    def add(self, scores: Tensor, targets: Tensor) -> None:
        """Take the next columns in, and drop what has fallen out of every list."""
        stop = self._count + scores.shape[1]
        columns = ScoreColumns(scores, torch.arange(self._count, stop), targets)
        self._count = stop
        if self._columns is not None:
            columns = merge_columns([self._columns, columns])
        listed = self._listed(columns)
        self._columns = ScoreColumns(columns.scores[:, listed], columns.positions[listed], columns.targets[listed])

    def columns(self) -> ScoreColumns:
        """Return the columns, in the order of their positions."""
        if self._columns is None:
            raise ValueError("train: expected samples to score, got none")
        return self._columns

    def _listed(self, columns: ScoreColumns) -> Tensor:
        """Return the indices of the columns that are in a list of any query."""
        lists = [columns.scores, -columns.scores]
        are_classes = columns.targets.ndim == 1 and not columns.targets.is_floating_point()
        if are_classes and self._query_targets.ndim == 1:
            equal = columns.targets[None, :] == self._query_targets[:, None]
            lists.append(columns.scores.masked_fill(equal, -torch.inf))
        k = min(self._k, columns.scores.shape[1])
        return torch.cat([scores.topk(k, dim=1).indices.flatten() for scores in lists]).unique()


def merge_columns(subsets: Sequence[ScoreColumns]) -> ScoreColumns:
    """Return the columns of all subsets, in the order of their positions."""
    if len(subsets) == 1:
        return subsets[0]
    merged = ScoreColumns(
        torch.cat([columns.scores for columns in subsets], dim=1),
        torch.cat([columns.positions for columns in subsets]),
        torch.cat([columns.targets for columns in subsets]),
    )
    order = merged.positions.argsort()
    return ScoreColumns(merged.scores[:, order], merged.positions[order], merged.targets[order])


def overlap(left: ScoreColumns, right: ScoreColumns, k: int) -> float:
    """Return the share of each query's `k` most helpful and `k` most harmful that both hold, mean over queries."""
    shares = []
    for sign in (1, -1):
        for left_scores, right_scores in zip(sign * left.scores, sign * right.scores, strict=True):
            first, second = (
                set(columns.positions[scores.topk(min(k, len(scores))).indices].tolist())
                for columns, scores in ((left, left_scores), (right, right_scores))
            )
            shares.append(len(first & second) / max(1, min(k, len(first))))
    return sum(shares) / len(shares)
