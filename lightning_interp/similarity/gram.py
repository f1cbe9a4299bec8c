"""Gram matrices of features too wide to store."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.similarity.representation import double
from lightning_interp.similarity.symmetric_product import symmetric_product

CONSTANT_ROUNDING = 8  # in eps of the values: what equal features may differ by, since a forward rounds a few times


class FeatureBlock:
    """Rows of wide features, written batch by batch into memory that is reserved once, less the first batch's mean."""

    def __init__(self, n: int) -> None:
        self.n, self.filled = n, 0
        self.shift: Tensor
        self.rows: Tensor

    def add(self, features: Float[Tensor, "batch d"]) -> None:
        """Write the next batch."""
        if not self.filled:
            self.shift = features.mean(0)
            self.rows = features.new_empty(self.n, features.shape[1])
        stop = self.filled + len(features)
        if stop <= self.n:
            torch.sub(features, self.shift, out=self.rows[self.filled : stop])
        self.filled = stop

    def all_rows(self, label: str) -> Float[Tensor, "n d"]:
        """Return all rows.

        Raises:
            ValueError: more or fewer were written than reserved; `label` is named.
        """
        check_rows(label, self.n, self.filled)
        return self.rows


def check_rows(label: str, expected: int, got: int, what: str = "samples") -> None:
    """Raise a ValueError where a layer was not called as often as in the first pass."""
    if got != expected:
        raise ValueError(
            f"{label}: expected {expected} {what}, got {got}; a layer that is not called equally often on all batches"
            " must be left out of layers="
        )


def centred_gram(label: str, block: FeatureBlock) -> Float[Tensor, "n n"]:
    """Return the Gram matrix of a block's centred columns; zero where they differ by rounding alone.

    The block lacks the mean of its first batch. What remains of the mean is subtracted from the product, which costs no
    digits where it is small; where the first batch was unlike the others, it is subtracted from the block before.

    Raises:
        ValueError: features are not finite, or more or fewer rows were written than reserved; `label` is named.
    """
    rows = block.all_rows(label)
    product = _block_product(rows)
    spread = product.diagonal().mean()
    if not bool(spread.isfinite()):
        raise ValueError(f"{label}: activations hold NaN or infinity, or are too large to be squared")
    if spread <= (CONSTANT_ROUNDING * torch.finfo(rows.dtype).eps) ** 2 * block.shift.square().sum():
        return product.zero_()
    if product.mean() > spread / 2:
        product = _block_product(rows.sub_(rows.mean(0)))
    means = product.mean(0) - product.mean() / 2
    return product.sub_(means + means[:, None])


def _block_product(block: Tensor) -> Tensor:
    return symmetric_product(double(block) if block.is_cuda else block)
