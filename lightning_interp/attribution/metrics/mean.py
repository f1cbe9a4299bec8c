"""Means over samples, as metrics."""

from __future__ import annotations

import zlib

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric


class SampleSums(Metric):
    """Sums over all batches and ranks of what `update` adds, one row per sample. Abstract.

    All states are sums, so that it is exact under DDP.

    Args:
        options: what the metric was given.
        shape: of one row.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, *options: object, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        # A MetricCollection lets metrics share their states from then on where the first batch made them equal.
        kind = zlib.crc32(repr((type(self).__name__, *options)).encode())
        self.add_state("kind", torch.tensor(kind, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)
        self.kind: Tensor
        self.total: Tensor
        self.count: Tensor

    def add(self, values: Float[Tensor, "n *shape"]) -> None:
        """Add one row per sample."""
        # Not in place: what was made in inference mode cannot be written to outside.
        self.total = self.total + values.to(self.total).sum(0)
        self.count = self.count + len(values)

    def mean(self) -> Float[Tensor, "*shape"]:
        """Return the mean over all samples so far; NaN as soon as one row is, or where there is none."""
        return self.total / self.count


class MeanOverSamples(SampleSums):
    """Mean over samples of the numbers that `update` adds. Abstract."""

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean over all samples so far; NaN as soon as one number is, or where there is none."""
        return self.mean()
