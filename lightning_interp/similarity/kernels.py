"""Kernels for CKA: a layer's Gram matrix over samples, from what rotations leave unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.similarity.representation import Form, Representation


@runtime_checkable
class Kernel(Protocol):
    """Makes a Gram matrix of a prepared layer; `LinearKernel` and `RBFKernel` do.

    A kernel may also have a `name`, for the tag of CKA (else its class's), and say what a layer must keep: `needs`, as
    for a `Measure` ("scores" where it does not).
    """

    def __call__(self, x: Representation) -> Tensor:
        """Return the kernel's value for each pair of samples, `(n, n)`."""


@dataclass(frozen=True)
class LinearKernel:
    """k(x, y) = ⟨x, y⟩ of the centred features."""

    name: ClassVar[str] = ""
    needs: ClassVar[Form] = "gram"

    def __call__(self, x: Representation) -> Float[Tensor, "n n"]:
        """Return the Gram matrix."""
        return x.gram


@dataclass(frozen=True)
class RBFKernel:
    """k(x, y) = exp(−‖x − y‖² / 2σ²), σ a fraction of the median distance over all pairs of samples.

    Args:
        median_fraction: σ in units of the median pairwise distance (i < j); small for local, large for near-linear.
    """

    median_fraction: float = 0.5

    def __post_init__(self) -> None:
        if not self.median_fraction > 0:
            raise ValueError(f"RBFKernel(median_fraction=...): expected a positive number, got {self.median_fraction}")

    @property
    def name(self) -> str:
        """What CKA's tag gets."""
        return f"RBF_{self.median_fraction}"

    def __call__(self, x: Representation) -> Float[Tensor, "n n"]:
        """Return the Gram matrix; NaN where more than half of all pairs coincide, so that there is no scale."""
        gram = x.gram
        squares = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
        pairs = squares[tuple(torch.triu_indices(x.n, x.n, 1))].clamp(min=0).sqrt()
        width = self.median_fraction * _median(pairs)
        return torch.exp(-squares.clamp(min=0) / (2 * width**2))


def _median(values: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """Return the median, between the two middle values of an even number (torch's own takes the lower)."""
    ordered, m = values.sort().values, len(values)
    return (ordered[(m - 1) // 2] + ordered[m // 2]) / 2
