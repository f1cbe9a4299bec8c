"""Samples: a dataset read in its own order, in batches, without drawing from any global random generator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from lightning_interp.data.dataset_rng import preserve_dataset_rng


def identity(batch: Any) -> Any:
    """Return the batch itself."""
    return batch


@dataclass(frozen=True)
class Samples:
    """A map-style dataset, read in index order, as often as needed.

    Args:
        dataset: with `__len__` and `__getitem__`.
        batch_size: samples per batch.
        collate: list of samples → batch.
        workers: processes that read; 0 reads in this one.
        move: batch → batch, e.g. to the model's device.
        indices: which samples of `dataset`; all when None.
        worker_init: called in each worker, as the loader's `worker_init_fn`.
        context: the workers' `multiprocessing_context`.

    >>> samples = Samples([10, 11, 12, 13], batch_size=2)
    >>> [batch.tolist() for batch in samples], len(samples)
    ([[10, 11], [12, 13]], 4)
    >>> samples.spread(2).ids
    [0, 3]
    """

    dataset: Any
    batch_size: int = 64
    collate: Callable[[list[Any]], Any] = default_collate
    workers: int = 0
    move: Callable[[Any], Any] = identity
    indices: tuple[int, ...] | None = None
    worker_init: Callable[[int], None] | None = None
    context: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.dataset, IterableDataset) or not hasattr(self.dataset, "__len__"):
            raise ValueError(
                "dataset: expected one with indices (__len__ and __getitem__), got"
                f" {type(self.dataset).__name__}, whose samples cannot be named"
            )

    @classmethod
    def of(cls, source: Any, move: Callable[[Any], Any] = identity) -> Samples:
        """Read a dataset, or the dataset behind a loader with that loader's batch size and collate."""
        if isinstance(source, Samples):
            return source
        if not isinstance(source, DataLoader):
            return cls(source, move=move)
        return cls(
            source.dataset,
            batch_size=source.batch_size or getattr(source.batch_sampler, "batch_size", None) or 64,
            collate=source.collate_fn,
            workers=source.num_workers,
            move=move,
            worker_init=source.worker_init_fn,
            context=source.multiprocessing_context,
        )

    def __len__(self) -> int:
        return len(self.dataset) if self.indices is None else len(self.indices)

    def __iter__(self) -> Iterator[Any]:
        """Yield batches. Reading draws from no global generator; those that the dataset carries are restored."""
        if self.collate is default_collate and (batches := self._batches_of_tensors()) is not None:
            yield from map(self.move, batches)
            return
        loader: DataLoader[Any] = DataLoader(
            self.dataset if self.indices is None else Subset(self.dataset, self.indices),
            batch_size=self.batch_size,
            collate_fn=self.collate,
            num_workers=self.workers,
            worker_init_fn=self.worker_init,
            multiprocessing_context=self.context if self.workers else None,
            generator=torch.Generator(),  # else the loader draws a seed for its workers from the global one
        )
        with preserve_dataset_rng(self.dataset):
            for batch in loader:
                yield self.move(batch)

    def _batches_of_tensors(self) -> Iterator[list[Tensor]] | None:
        """Return the loader's batches of a dataset of tensors, 50 times faster as whole slices; None for others."""
        dataset: Any = self.dataset
        rows = torch.arange(len(dataset)) if self.indices is None else torch.tensor(self.indices, dtype=torch.long)
        while type(dataset) is Subset:
            indices = np.ascontiguousarray(dataset.indices, dtype=np.int64)
            dataset, rows = dataset.dataset, torch.from_numpy(indices)[rows]
        if type(dataset) is not TensorDataset:
            return None
        rows = torch.where(rows < 0, rows + len(dataset), rows)
        batches = rows.split(self.batch_size) if len(rows) else ()
        return ([tensor.index_select(0, batch.to(tensor.device)) for tensor in dataset.tensors] for batch in batches)

    @property
    def resizable(self) -> bool:
        """Whether the batch size can be changed without changing the samples themselves.

        The default collate only stacks them, but samples that are each a batch of their own may differ in size; another
        collate may pad them to the longest of a batch.
        """
        return self.collate is default_collate and self.batch_size > 1

    @property
    def ids(self) -> list[int]:
        """Index of each sample in the original dataset, through any `Subset` around it."""
        indices: Sequence[int] = range(len(self.dataset)) if self.indices is None else self.indices
        return original_indices(self.dataset, indices)

    def spread(self, count: int) -> Samples:
        """Return `count` samples (or all, if fewer) at even distances, so that sorted datasets are covered."""
        return self if count >= len(self) else self.at(self.spread_indices(count))

    def spread_indices(self, count: int) -> list[int]:
        """Return `count` positions at even distances, the first and the last among them."""
        return [int(position) for position in np.linspace(0, len(self) - 1, count).round()]

    def at(self, positions: Sequence[int]) -> Samples:
        """Return the samples at these positions among these samples."""
        indices = tuple(positions) if self.indices is None else tuple(self.indices[p] for p in positions)
        return dataclasses.replace(self, indices=indices)


def train_and_query_samples(train: Any, query: Any) -> tuple[Samples, Samples]:
    """Return training samples and queries.

    Raises:
        ValueError: there are none of either.
    """
    samples, queries = Samples.of(train), Samples.of(query)
    if not len(samples) or not len(queries):
        raise ValueError(f"train, query: expected samples in both, got {len(samples)} and {len(queries)}")
    return samples, queries


def original_indices(dataset: Dataset[Any], indices: Sequence[int]) -> list[int]:
    """Return the indices that samples of nested `Subset`s have in the dataset underneath.

    >>> inner = Subset(range(10), [5, 6, 7])
    >>> original_indices(Subset(inner, [2, 0]), [0, 1])
    [7, 5]
    """
    originals = [int(i) for i in indices]
    while isinstance(dataset, Subset):
        originals = [int(dataset.indices[i]) for i in originals]
        dataset = dataset.dataset
    return originals


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """Return the names in `dataset.classes` (torchvision's convention), through any `Subset`, else None."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None
