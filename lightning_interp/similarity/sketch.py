"""Wide features reduced by random signs, so that their Gram matrix costs a fraction and stays right in the mean."""

from __future__ import annotations

import zlib

import torch
from jaxtyping import Float
from torch import Tensor


class Sketch:
    """Adds up a layer's d features, each with a random sign, in k buckets: column j goes to bucket j mod k.

    The Gram matrix of the sketch equals that of the features in the mean over signs. Linear CKA from sketches of two
    layers with signs of their own is nearly unbiased once the sketch's own noise is taken off the norms (`CKA` does);
    what is left falls as 1/√k.

    Reference: Charikar, Chen and Farach-Colton, Finding Frequent Items in Data Streams, 2002; Weinberger et al.,
    Feature Hashing for Large Scale Multitask Learning, 2009.

    Args:
        size: number of buckets k.
        key: what is sketched: run, moment and layer; two that are compared must differ in it, or their noise is one.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self.signs = zlib.crc32(key.encode())
        self._generator = torch.Generator().manual_seed(self.signs)
        self._drawn: Tensor | None = None

    def __call__(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Return the sketch of some samples; all calls use the same signs."""
        if self._drawn is None:
            drawn = torch.randint(0, 2, (features.shape[1],), generator=self._generator)
            self._drawn = (2 * drawn - 1).to(features)
        sketched = features[:, : self.size] * self._drawn[: self.size]
        for start in range(self.size, features.shape[1], self.size):
            columns = slice(start, start + self.size)
            part, signs = features[:, columns], self._drawn[columns]
            sketched[:, : part.shape[1]].addcmul_(part, signs)
        return sketched


def squared_norm(estimate: Tensor, trace: Tensor, width: int, size: int) -> Tensor:
    """Return ‖K‖²_F from a sketch's ‖K̂‖²_F, whose mean is (1 + c) ‖K‖²_F + c (tr K)².

    c is the share of pairs of features that fall into one bucket, about 1/k; features that do are taken to be as much
    alike as any.
    """
    each, more = divmod(width, size)
    pairs = more * (each + 1) * each + (size - more) * each * (each - 1)
    collide = pairs / (width * (width - 1))
    return (estimate - collide * trace.square()) / (1 + collide)
