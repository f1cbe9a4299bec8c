"""What every curvature offers: estimate it, then ask for (H + Λ)⁻¹ between gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from operator import add
from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_interp.data.samples import Samples
from lightning_interp.influence.gradients.factored import FactoredGradients
from lightning_interp.influence.gradients.reader import Reader

Gradients = Mapping[str, FactoredGradients]
Shift = Mapping[str, float | Tensor]
Scorer = Callable[[Gradients], Tensor]


@runtime_checkable
class Inverse(Protocol):
    """A damped curvature's inverse, asked between gradients."""

    def against(self, queries: Gradients) -> Scorer:
        """Return a function: gradients of m samples → ∇ℓ_qᵀ (H + Λ)⁻¹ ∇ℓ_i, `(q, m)`."""

    def squares(self, rows: Gradients) -> Tensor:
        """Return ∇ℓ_iᵀ (H + Λ)⁻¹ ∇ℓ_i of each sample, `(n,)`."""


@runtime_checkable
class Solver(Protocol):
    """An inverse that also gives its products with gradients as vectors."""

    def solve(self, rows: Gradients) -> dict[str, Tensor]:
        """Return (H + Λ)⁻¹ ∇ℓ of each sample: block → `(q, groups, o, i)`."""


@runtime_checkable
class Fitted(Protocol):
    """A curvature estimated from data."""

    @property
    def n(self) -> int:
        """Number of samples used."""

    @property
    def mean_eigenvalue(self) -> float:
        """Mean over all eigenvalues."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know about it."""

    def inverse(self, shift: Shift) -> Inverse:
        """Return (H + Λ)⁻¹, Λ given per block: a number, or `(groups, o, i)`."""


@runtime_checkable
class Curvature(Protocol):
    """How the curvature is estimated; `EKFAC`, `KFAC`, `GaussNewton` and `IdentityCurvature` are such."""

    def check(self, parameters: int) -> None:
        """Raise a ValueError if it cannot be estimated for so many parameters."""

    def fit(self, reader: Reader, samples: Samples) -> Fitted:
        """Estimate it from the training samples."""


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors."""
    return reduce(add, parts)
