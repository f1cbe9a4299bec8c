"""Probe: the fixed samples on which a network is compared over training, their ids and a fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_interp.checks import ArgumentError
from lightning_interp.data.batch import count_samples, is_ragged, map_tensors, slice_samples, tensors
from lightning_interp.data.samples import Samples
from lightning_interp.data.task import Task


@dataclass(frozen=True)
class Probe:
    """Samples read once and kept on the CPU, so that every snapshot of the network is of the same ones.

    Args:
        batches: as the loader collated them.
        ids: index of each sample in the original dataset, or its position in the stream.
        source: where they come from, in words.
        fingerprint: SHA-256 over the inputs' values, types and shapes; targets do not enter.
    """

    batches: tuple[Any, ...]
    ids: tuple[int, ...]
    source: str
    fingerprint: str

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.ids)


def take_probe(source: Samples | Iterable[Any], count: int, name: str, task: Task) -> Probe:
    """Read `count` samples for a probe: evenly spread over a dataset, or the first of a stream of batches.

    Args:
        source: a dataset read in order, or any iterable of collated batches.
        count: how many samples; fewer if the source has fewer.
        name: the source in words, for messages and captions.
        task: separates the inputs, of which the fingerprint is computed, from the targets.

    Raises:
        ArgumentError: the source has no sample.
    """
    if isinstance(source, Samples):
        samples = source.spread(count)
        batches = _split_into_batches(samples) if len(samples) else []
        ids = samples.ids
    else:
        batches = list(_first_batches(source, count))
        ids = list(range(sum(map(count_samples, batches))))
    if not ids:
        raise ArgumentError(f"probe: expected at least one sample, got an empty {name}")
    return Probe(tuple(batches), tuple(ids), name, fingerprint([task.inputs(b) for b in batches]))


def subset_of_probe(probe: Probe, indices: Sequence[int]) -> Probe:
    """Return some samples of a probe, by their indices in it, each as a batch of its own."""
    starts = [0]
    for batch in probe.batches:
        starts.append(starts[-1] + count_samples(batch))
    batches = []
    for index in indices:
        number = max(i for i, start in enumerate(starts) if start <= index)
        batches.append(slice_samples(probe.batches[number], index - starts[number], index - starts[number] + 1))
    return Probe(tuple(batches), tuple(probe.ids[index] for index in indices), probe.source, probe.fingerprint)


def split_ragged(probe: Probe, task: Task) -> Probe:
    """Return a probe of single samples where a batch holds images of different sizes; else the probe itself."""
    return subset_of_probe(probe, range(probe.n)) if any(is_ragged(task.inputs(b)) for b in probe.batches) else probe


def fingerprint(inputs: Any) -> str:
    """Return the SHA-256 of all tensors in a structure: their types, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors(inputs):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _split_into_batches(samples: Samples) -> list[Any]:
    """Read all samples as one batch, so that padding is the same for all, and cut it into batches of their size."""
    (whole,) = (map_tensors(_copy_to_cpu, batch) for batch in dataclasses.replace(samples, batch_size=len(samples)))
    if count_samples(whole) != len(samples):
        return [whole]
    starts = range(0, len(samples), samples.batch_size)
    return [slice_samples(whole, start, start + samples.batch_size) for start in starts]


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    """Copy a tensor: some datasets hand out views of a buffer that they overwrite later."""
    return tensor.detach().cpu().clone()


def _first_batches(stream: Iterable[Any], count: int) -> Iterator[Any]:
    missing = count
    for batch in stream:
        copy = map_tensors(_copy_to_cpu, slice_samples(batch, 0, min(missing, count_samples(batch))))
        missing -= count_samples(copy)
        yield copy
        if missing <= 0:
            return
