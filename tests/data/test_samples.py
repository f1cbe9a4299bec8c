"""Datasets in order, probes with a fingerprint, batches of any structure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_interp import Task
from lightning_interp.data.batch import count_samples, map_tensors, single_sample, slice_samples, tensors
from lightning_interp.data.probe import fingerprint, take_probe
from lightning_interp.data.samples import Samples, class_names


class Point(NamedTuple):
    x: Tensor
    name: str


@dataclass
class Record:
    x: Tensor
    ids: list[str]


@pytest.mark.parametrize(
    "batch",
    [
        torch.arange(4),
        (torch.arange(4), torch.ones(4)),
        [torch.arange(4), "name"],
        {"x": torch.arange(4), "scale": torch.tensor(2.0)},
        Point(torch.arange(4), "p"),
        Record(torch.arange(4), ["a", "b", "c", "d"]),
        {"deep": [(torch.arange(4),)]},
    ],
)
def test_batches_keep_their_structure(batch: Any) -> None:
    doubled = map_tensors(lambda t: t * 2, batch)
    assert type(doubled) is type(batch)
    assert [t.tolist() for t in tensors(doubled)] == [(t * 2).tolist() for t in tensors(batch)]
    assert count_samples(batch) == 4
    assert next(tensors(slice_samples(batch, 1, 3))).tolist() == [1, 2]
    assert next(tensors(single_sample(batch, 2))).tolist() in (2, [0, 1, 2, 3])


def test_a_batch_without_samples_is_named() -> None:
    with pytest.raises(ValueError, match="expected at least one tensor"):
        count_samples({"a": "text"})


def test_order_and_ids_through_subsets() -> None:
    data = TensorDataset(torch.arange(20))
    inner = Subset(Subset(data, list(range(10, 20))), [3, 1, 4])
    samples = Samples.of(DataLoader(inner, batch_size=2, shuffle=True))
    assert [batch[0].tolist() for batch in samples] == [[13, 11], [14]]
    assert samples.ids == [13, 11, 14]
    assert samples.at([2]).ids == [14]
    assert [batch[0].tolist() for batch in samples.at([2, 0])] == [[14, 13]]
    assert Samples(data).spread(3).ids == [0, 10, 19]


@pytest.mark.parametrize("indices", [np.array([3, 1, 2])[::-1], [-2, 1], torch.tensor([2, 0]), range(2, 4), []])
def test_subsets_are_sliced_as_they_are_read(indices: Any) -> None:
    data = Subset(TensorDataset(torch.arange(5)), indices)
    read = [data[place][0].item() for place in range(len(data))]
    assert [value for batch in Samples(data, batch_size=2) for value in batch[0].tolist()] == read
    assert len(list(Samples(data, batch_size=2))) == -(-len(read) // 2)


def test_batches_of_one_may_be_of_different_sizes() -> None:
    assert Samples(TensorDataset(torch.arange(4))).resizable
    assert not Samples.of(DataLoader([torch.zeros(2), torch.zeros(3)], batch_size=1)).resizable


class Doubled(Subset[Any]):
    def __getitem__(self, index: Any) -> Any:
        return tuple(2 * part for part in super().__getitem__(index))

    def __getitems__(self, indices: list[int]) -> Any:
        return [self[index] for index in indices]


def test_a_subset_with_items_of_its_own_is_read_by_them() -> None:
    data = Doubled(TensorDataset(torch.arange(6)), [4, 5])
    assert [batch[0].tolist() for batch in Samples(data)] == [[8, 10]]
    assert [batch[0].tolist() for batch in Samples(Subset(data, [1]))] == [[10]]


def test_workers_draw_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    assert len(list(Samples(TensorDataset(torch.arange(6)), batch_size=2, workers=1))) == 3
    assert torch.equal(before, torch.get_rng_state())


def test_a_stream_has_no_indices() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(range(3))

    with pytest.raises(ValueError, match="expected one with indices"):
        Samples.of(Stream())


def test_class_names_are_found_below_subsets() -> None:
    data = TensorDataset(torch.arange(4))
    assert class_names(data) is None
    data.classes = ["cat", "dog"]  # type: ignore[attr-defined]
    assert class_names(Subset(data, [1])) == ("cat", "dog")


def test_probes() -> None:
    data = TensorDataset(torch.arange(100.0)[:, None], torch.arange(100))
    probe = take_probe(Samples(data, batch_size=4), 5, "validation set", Task())
    assert probe.ids == (0, 25, 50, 74, 99)
    assert [count_samples(b) for b in probe.batches] == [4, 1]
    again = take_probe(Samples(data, batch_size=4), 5, "other", Task())
    assert again.fingerprint == probe.fingerprint
    relabelled = TensorDataset(data.tensors[0], data.tensors[1] + 1)
    assert take_probe(Samples(relabelled, batch_size=4), 5, "", Task()).fingerprint == probe.fingerprint
    moved = TensorDataset(data.tensors[0] + 1e-3, data.tensors[1])
    assert take_probe(Samples(moved, batch_size=4), 5, "", Task()).fingerprint != probe.fingerprint


def test_a_probe_of_a_stream_takes_the_first() -> None:
    read = []

    def stream() -> Any:
        for i in range(10):
            read.append(i)
            yield torch.full((4, 2), i), torch.zeros(4)

    probe = take_probe(stream(), 6, "stream", Task())
    assert [count_samples(b) for b in probe.batches] == [4, 2]
    assert probe.ids == (0, 1, 2, 3, 4, 5)
    assert read == [0, 1]


def test_a_probe_is_a_copy() -> None:
    x = torch.zeros(3, 2)
    probe = take_probe([(x, torch.zeros(3))], 3, "", Task())
    x += 1
    assert float(probe.batches[0][0].sum()) == 0


def test_an_empty_probe_is_named() -> None:
    for source in (Samples(TensorDataset(torch.zeros(0, 2))), []):
        with pytest.raises(ValueError, match="expected at least one sample, got an empty validation set"):
            take_probe(source, 4, "validation set", Task())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64])
def test_fingerprints_of_every_type(dtype: torch.dtype) -> None:
    a, b = torch.tensor([0, 1]).to(dtype), torch.tensor([1, 0]).to(dtype)
    assert fingerprint(a) == fingerprint(a.clone())
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(a) != fingerprint(a[None])


class Draws(torch.utils.data.Dataset):
    """Augments by generators of its own, one of them inside a transform."""

    def __init__(self) -> None:
        self.torch = torch.Generator().manual_seed(0)
        self.transforms = [SimpleNamespace(numpy=np.random.default_rng(0), python=random.Random(0))]
        self.legacy = {"a": np.random.RandomState(0)}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        inner = self.transforms[0]
        drawn = inner.numpy.random() + inner.python.random() + self.legacy["a"].rand()
        return torch.rand(1, generator=self.torch) + drawn


def test_a_datasets_own_generators_are_put_back() -> None:
    data = Draws()
    first = torch.cat(list(Samples(Subset(data, [0, 1]))))
    assert torch.equal(torch.cat(list(Samples(Subset(data, [0, 1])))), first)
    next(iter(Samples(data, batch_size=1)))
    assert torch.equal(torch.cat([data[i][None] for i in range(2)]), first)


def test_a_probe_is_padded_alike() -> None:
    def collate(rows: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    data = [torch.arange(1, n) for n in (3, 9, 4, 2, 5)]
    probe = take_probe(Samples(data, batch_size=2, collate=collate), 5, "", Task())
    assert [tuple(batch.shape) for batch in probe.batches] == [(2, 8), (2, 8), (1, 8)]


def test_workers_are_those_of_the_loader() -> None:
    loader = DataLoader(
        TensorDataset(torch.arange(4)),
        num_workers=1,
        worker_init_fn=_noted,
        multiprocessing_context="fork",
    )
    assert Samples.of(loader).worker_init is _noted
    assert [int(batch[0]) for batch in Samples.of(loader)] == [0, 1, 2, 3]


def _noted(_: int) -> None:
    pass
