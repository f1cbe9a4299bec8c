"""Samples read through a network, in batches that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_interp.data.batch import count_samples, device_of, select_samples, slice_samples, to_device
from lightning_interp.data.samples import Samples
from lightning_interp.influence.gradients.coverage import Coverage
from lightning_interp.influence.gradients.distributed import Ranks, SingleProcess, share_of_rank
from lightning_interp.influence.gradients.factored import FactoredGradients
from lightning_interp.influence.gradients.ggn_columns import CurvatureColumns, PrioritySample, Root, hessian_root
from lightning_interp.influence.gradients.per_sample import PerSampleGradients
from lightning_interp.progress import Progress, quiet

SINGLE_PROCESS = SingleProcess()
ELEMENTS_AT_ONCE = 2**20  # of a batch's factors, or all that a network makes of it: 4 MB in float32
LARGEST_BATCH = 1024  # beyond it a small network's overhead per batch no longer counts
ZERO_COLUMN = 1e-12  # of the largest squared norm; one that is zero but for float32's rounding has about 1e-14


@dataclass(frozen=True, eq=False)
class Reader:
    """How samples go through one covered network.

    Args:
        coverage: the network, and what of it is covered.
        max_batch_size: how many samples fit in memory.
        progress: shows how far a pass has come.
        ranks: the processes that share passes over all samples.
    """

    coverage: Coverage
    max_batch_size: int
    progress: Progress = quiet
    ranks: Ranks = SINGLE_PROCESS

    @classmethod
    def of(
        cls, coverage: Coverage, samples: Samples, progress: Progress = quiet, ranks: Ranks = SINGLE_PROCESS
    ) -> Reader:
        """Return a reader whose batches fit in memory.

        No more than the samples' own batches have, or where these may have any size up to 1,024 if all that the network
        makes of them fits: most of a small network's cost is overhead.

        Args:
            coverage: the network, and what of it is covered.
            samples: that will be read.
            progress: shows how far a pass has come.
            ranks: the processes that share passes over all samples.
        """
        factors = max(1, sum(coverage.memory.factors.values()))
        everything = factors + coverage.memory.activations
        # A forward of the user's own batch size fits anyway, so that only the factors, kept besides, are bounded.
        own_batches = max(1, min(samples.batch_size, ELEMENTS_AT_ONCE // factors))
        larger_batches = min(LARGEST_BATCH, ELEMENTS_AT_ONCE // everything) if samples.resizable else 1
        return cls(coverage, max(own_batches, larger_batches), progress, ranks)

    def rebatch(self, samples: Samples) -> Samples:
        """Return samples in the largest batches that need not be split, where batches may have any size."""
        return replace(samples, batch_size=self.max_batch_size) if samples.resizable else samples

    def batches(self, samples: Samples, description: str) -> Iterator[Any]:
        """Yield the samples in batches that fit, on the network's device."""
        device, step = device_of(self.coverage.model), self.max_batch_size
        for batch in self.progress(samples, -(-len(samples) // samples.batch_size), description):
            batch, n = to_device(batch, device), count_samples(batch)
            if n <= step:
                yield batch
            else:
                yield from (slice_samples(batch, start, start + step) for start in range(0, n, step))

    def per_sample_gradients(self, samples: Samples, description: str) -> Iterator[PerSampleGradients]:
        """Yield one forward of each batch."""
        for batch in self.batches(samples, description):
            yield PerSampleGradients(self.coverage.watched_model, batch)

    def sample_columns(self, samples: Samples, count: int, seed: int) -> CurvatureColumns:
        """Return an unbiased sample of the curvature's columns, from one forward over the samples."""
        share, sample_indices = share_of_rank(samples, self.ranks)
        # Another seed on each rank, as priorities must be independent.
        generator = torch.Generator().manual_seed(seed + self.ranks.index)
        sample, start = PrioritySample(count, generator), 0
        for root in self._roots(share, generator):
            stop = start + len(root.norms)
            sample.add(root, torch.tensor(sample_indices[start:stop]))
            start = stop
        return sample.columns(self.ranks.gather(sample.sampled_columns()))

    def gradients_of_all_columns(
        self, samples: Samples, seed: int, description: str
    ) -> Iterator[dict[str, FactoredGradients]]:
        """Yield gradients whose squares sum to the curvature times n: one backward per column."""
        generator = torch.Generator().manual_seed(seed)
        for forward in self.per_sample_gradients(samples, description):
            root = hessian_root(forward.outputs, forward.targets, self.coverage.task, generator)
            rows = torch.arange(len(forward), device=root.norms.device)
            for index in _nonzero_columns(root.norms):
                column = root.column(rows, torch.full_like(rows, index))
                yield forward.output_gradients(column.reshape(forward.outputs.shape), keep_graph=True)

    def gradients_of_columns(
        self, samples: Samples, columns: CurvatureColumns, description: str
    ) -> Iterator[dict[str, FactoredGradients]]:
        """Yield the gradients of sampled columns: one backward each, of their samples alone."""
        # Columns are in the order of their samples; each sample is read once for all of its columns.
        sample_indices, row_of_column = columns.sample_indices.unique_consecutive(return_inverse=True)
        if not len(sample_indices):
            return
        start, device = 0, device_of(self.coverage.model)
        samples = samples.at(sample_indices.tolist())
        for batch in self.progress(samples, -(-len(samples) // samples.batch_size), description):
            in_batch = ((row_of_column >= start) & (row_of_column < start + count_samples(batch))).nonzero()[:, 0]
            for indices in in_batch.split(self.max_batch_size):
                inputs = to_device(select_samples(batch, row_of_column[indices] - start), device)
                forward = PerSampleGradients(self.coverage.watched_model, inputs)
                yield forward.output_gradients(columns.vectors[indices].reshape(forward.outputs.shape))
            start += count_samples(batch)

    def _roots(self, samples: Samples, generator: torch.Generator) -> Iterator[Root]:
        model, task = self.coverage.model, self.coverage.task
        for batch in self.batches(samples, "curvature, columns"):
            with torch.no_grad():
                outputs = task.outputs(model, task.inputs(batch))
            yield hessian_root(outputs, task.targets(batch), task, generator)


def _nonzero_columns(norms: Tensor) -> list[int]:
    """Return the columns that are not zero for all samples; at least one."""
    largest = norms.amax(dim=0)
    # A column of zeros rather than none, so that every block appears in the pass.
    return (largest > ZERO_COLUMN * largest.max()).nonzero()[:, 0].tolist() or [0]
