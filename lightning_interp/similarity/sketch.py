"""Wide features reduced by random signs: their Gram matrix costs a fraction, and is unbiased."""

from __future__ import annotations

import zlib

import torch
from jaxtyping import Float
from torch import Tensor


class Sketch:
    """Adds up a layer's d features, each with a random sign, in k buckets: column j goes to bucket j mod k.

    The Gram matrix of the sketch equals that of the features in the mean over signs. Linear CKA from sketches of two
    layers with independent signs is nearly unbiased once the sketch's noise is subtracted from the norms (`CKA` does);
    the error that remains falls as 1/√k.

    Reference: Charikar, Chen and Farach-Colton, Finding Frequent Items in Data Streams, 2002; Weinberger et al.,
    Feature Hashing for Large Scale Multitask Learning, 2009.

    Args:
        size: number of buckets k.
        key: identifies what is sketched, by run, step and layer: two that are compared must differ in it, or they share
            their noise.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self.signs = zlib.crc32(key.encode())
        self._generator = torch.Generator().manual_seed(self.signs)
        self._column_signs: Tensor | None = None

    def __call__(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Return the sketch of some samples; all calls use the same signs."""
        if self._column_signs is None:
            bits = torch.randint(0, 2, (features.shape[1],), generator=self._generator)
            self._column_signs = (2 * bits - 1).to(features)
        sketched = features[:, : self.size] * self._column_signs[: self.size]
        for start in range(self.size, features.shape[1], self.size):
            columns = slice(start, start + self.size)
            block, signs = features[:, columns], self._column_signs[columns]
            sketched[:, : block.shape[1]].addcmul_(block, signs)
        return sketched


def squared_norm(estimate: Tensor, trace: Tensor, width: int, size: int) -> Tensor:
    """Return ‖K‖²_F from a sketch's ‖K̂‖²_F, whose mean is (1 + c) ‖K‖²_F + c (tr K)².

    c is the share of pairs of features that fall into one bucket, about 1/k; features that do are taken to be as much
    alike as any.
    """
    per_bucket, fuller = divmod(width, size)  # `fuller` buckets hold one feature more
    pairs = fuller * (per_bucket + 1) * per_bucket + (size - fuller) * per_bucket * (per_bucket - 1)
    collide = pairs / (width * (width - 1))
    return (estimate - collide * trace.square()) / (1 + collide)
