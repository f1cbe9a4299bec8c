"""Samples read through a network, in parts that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_interp.data.batch import device_of, select_rows, size, take, tensors, to_device
from lightning_interp.data.samples import Samples
from lightning_interp.influence.gradients.coverage import Coverage
from lightning_interp.influence.gradients.distributed import Ranks, SingleProcess, share_of_rank
from lightning_interp.influence.gradients.factored import FactoredGradients, elements_in_memory
from lightning_interp.influence.gradients.ggn_columns import CurvatureColumns, PrioritySample, Root, hessian_root
from lightning_interp.influence.gradients.per_sample import PerSampleGradients
from lightning_interp.network.undisturbed import capture
from lightning_interp.progress import Progress, quiet

SINGLE_PROCESS = SingleProcess()
ELEMENTS_AT_ONCE = 2**20
LARGEST_BATCH = 1024
SMALLEST = 1e-12


@dataclass(frozen=True, eq=False)
class Reader:
    """How samples go through one covered network.

    Args:
        coverage: the network, and what is watched of it.
        max_batch_size: how many samples fit in memory.
        progress: shows how far it got.
        ranks: the processes that share passes over all samples.
    """

    coverage: Coverage
    max_batch_size: int
    progress: Progress = quiet
    ranks: Ranks = SINGLE_PROCESS

    @classmethod
    def of(
        cls, coverage: Coverage, batch: Any, samples: Samples, progress: Progress = quiet, ranks: Ranks = SINGLE_PROCESS
    ) -> Reader:
        """Measure on one sample how many fit.

        No more than the samples' own batches have, or where these may have any size up to 1,024 if all that the network
        makes of them fits: most of a small network's cost is overhead.

        Args:
            coverage: the network, and what is watched of it.
            batch: to measure on.
            samples: that will be read.
            progress: shows how far it got.
            ranks: the processes that share passes over all samples.
        """
        model, one = coverage.model, take(batch, 0, 1)
        names = [name for name, _ in model.named_modules()]
        with capture(model, names, lambda _, __, output: output.numel()) as made:
            rows = PerSampleGradients(coverage.watched_model, one).loss_gradients()
        held = max(1, elements_in_memory(rows))
        all_held = held + sum(map(sum, made.values())) + sum(tensor.numel() for tensor in tensors(one))
        max_batch_size = max(1, min(samples.batch_size, ELEMENTS_AT_ONCE // held))
        larger = min(LARGEST_BATCH, ELEMENTS_AT_ONCE // all_held) if samples.resizable else 1
        return cls(coverage, max(max_batch_size, larger), progress, ranks)

    def rebatch(self, samples: Samples) -> Samples:
        """Return samples in batches that go through the network whole, where batches may have any size."""
        return replace(samples, batch_size=self.max_batch_size) if samples.resizable else samples

    def batches(self, samples: Samples, what: str) -> Iterator[Any]:
        """Yield the samples in parts, on the network's device."""
        device = device_of(self.coverage.model)
        for batch in self.progress(samples, -(-len(samples) // samples.batch_size), what):
            batch, n = to_device(batch, device), size(batch)
            if n <= self.max_batch_size:
                yield batch
            else:
                yield from (
                    take(batch, start, start + self.max_batch_size) for start in range(0, n, self.max_batch_size)
                )

    def per_sample_gradients(self, samples: Samples, what: str) -> Iterator[PerSampleGradients]:
        """Yield one forward of each part."""
        for batch in self.batches(samples, what):
            yield PerSampleGradients(self.coverage.watched_model, batch)

    def sample_columns(self, samples: Samples, count: int, seed: int) -> CurvatureColumns:
        """Return an unbiased sample of the curvature's columns, from one forward over the samples."""
        mine, places = share_of_rank(samples, self.ranks)
        draws = torch.Generator().manual_seed(seed + self.ranks.index)
        sample, start = PrioritySample(count, draws), 0
        for root in self._roots(mine, draws):
            stop = start + len(root.norms)
            sample.add(root, torch.tensor(places[start:stop]))
            start = stop
        return sample.columns(self.ranks.gather(sample.held()))

    def gradients_of_all_columns(
        self, samples: Samples, seed: int, what: str
    ) -> Iterator[dict[str, FactoredGradients]]:
        """Yield rows whose gradients' squares sum to the curvature times n: one backward per column."""
        draws = torch.Generator().manual_seed(seed)
        task = self.coverage.task
        for trace in self.per_sample_gradients(samples, what):
            root = hessian_root(trace.outputs, trace.targets, task, draws)
            rows = torch.arange(len(trace), device=root.norms.device)
            for place in _alive(root.norms):
                column = root.column(rows, torch.full_like(rows, place))
                yield trace.output_gradients(column.reshape(trace.outputs.shape), keep_graph=True)

    def gradients_of_columns(
        self, samples: Samples, columns: CurvatureColumns, what: str
    ) -> Iterator[dict[str, FactoredGradients]]:
        """Yield the rows of sampled columns: one backward each, of their samples alone."""
        places, where = columns.sample_indices.unique_consecutive(return_inverse=True)
        if not len(places):
            return
        start, device = 0, device_of(self.coverage.model)
        chosen = samples.at(places.tolist())
        for batch in self.progress(chosen, -(-len(chosen) // samples.batch_size), what):
            mine = ((where >= start) & (where < start + size(batch))).nonzero()[:, 0]
            for some in mine.split(self.max_batch_size):
                part = to_device(select_rows(batch, where[some] - start), device)
                trace = PerSampleGradients(self.coverage.watched_model, part)
                yield trace.output_gradients(columns.vectors[some].reshape(trace.outputs.shape))
            start += size(batch)

    def _roots(self, samples: Samples, draws: torch.Generator) -> Iterator[Root]:
        watch = self.coverage.watched_model
        for batch in self.batches(samples, "curvature, columns"):
            with torch.no_grad():
                outputs = watch.task.outputs(watch.model, watch.task.inputs(batch))
            yield hessian_root(outputs, watch.task.targets(batch), watch.task, draws)


def _alive(norms: Tensor) -> list[int]:
    """Return the columns that are not zero for all samples; at least one."""
    most = norms.amax(dim=0)
    return (most > SMALLEST * most.max()).nonzero()[:, 0].tolist() or [0]
