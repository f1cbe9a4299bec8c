"""Generalised Gauss–Newton matrix of randomly projected gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.checks import check_counts
from lightning_interp.data.samples import Samples
from lightning_interp.influence.curvature.curvature import Gradients, Scorer, Shift, spread_out
from lightning_interp.influence.curvature.ekfac import ColumnPass, column_passes
from lightning_interp.influence.curvature.gauss_newton import cholesky, whiten
from lightning_interp.influence.gradients.projection import Projection
from lightning_interp.influence.gradients.reader import Reader

PILED_ROWS = 2048  # projected gradients that are multiplied at once: 4 MB of float32 for 512 numbers each


@dataclass(frozen=True)
class ProjectedGaussNewton:
    """Generalised Gauss–Newton matrix in a random projection of the gradients to `dim` numbers.

    ∇ℓ_qᵀ (H + λ)⁻¹ ∇ℓ_i ≈ φ_qᵀ (P H Pᵀ + λ)⁻¹ φ_i, φ = P∇ℓ: a training sample is `dim` numbers for a network of any
    size, so that its gradient can be stored (see `GradientStore`). Curvature between layers is included. The projection
    blurs every dot product by about 1/√dim, which shows in the order of the scores: prefer `GaussNewton(columns=...)`
    where nothing is stored. A Λ per parameter is divided out before the projection.

    Reference: Park et al., TRAK: Attributing Model Behavior at Scale, 2023; Choe et al., What is Your Data Worth to
    GPT? LLM-Scale Data Valuation with Influence Functions, 2024.

    Args:
        dim: numbers per gradient, even.
        columns: how many columns of the matrix it is estimated from (see
            `PrioritySample`); every column of every sample when None.
        samples: training samples, evenly spread, that it is estimated from; all when None.
        seed: of the projection and the sample.
    """

    dim: int = 512
    columns: int | None = 2048
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts("ProjectedGaussNewton", columns=self.columns, samples=self.samples)
        Projection(self.dim)

    def check(self, parameters: int) -> None:
        """Accept any number of parameters."""

    def fit(self, reader: Reader, samples: Samples) -> FittedProjected:
        """Sum the projected columns' outer products, in one pass over them."""
        subset = spread_out(samples, self.samples)
        column_gradients, n, notes = column_passes(reader, subset, self.columns, self.seed)
        projection = Projection(self.dim, self.seed)
        matrix = second_moment(map(projection, column_gradients("curvature"))) / n
        return FittedProjected(projection, matrix, column_gradients, n, reader.coverage.size, notes)


@dataclass(frozen=True, eq=False)
class FittedProjected:
    """The projected matrix.

    Args:
        projection: of the gradients.
        matrix: P H Pᵀ, `(k, k)`, float64.
        column_gradients: a pass over the columns.
        n: number of samples used.
        elements: number of parameters' elements.
        notes: how many columns it was estimated from.
    """

    projection: Projection
    matrix: Float[Tensor, "k k"]
    column_gradients: ColumnPass
    n: int
    elements: int
    notes: tuple[str, ...] = ()

    @property
    def mean_eigenvalue(self) -> float:
        """Mean over all eigenvalues of H, whose trace the projection keeps in the mean."""
        return float(self.matrix.trace()) / self.elements

    def inverse(self, shift: Shift) -> ProjectedInverse:
        """Return (P H Pᵀ + λ)⁻¹, or with D = Λ^−½ P (D H D + I)⁻¹ Pᵀ between whitened gradients, in another pass."""
        numbers = {value for value in shift.values() if not isinstance(value, Tensor)}
        # One λ for all parameters can be added after the projection, without another pass.
        if len(numbers) == 1 and not any(isinstance(value, Tensor) for value in shift.values()):
            return ProjectedInverse(self.projection, self.matrix, numbers.pop())
        columns = (self.projection(whiten(rows, shift)) for rows in self.column_gradients("curvature, whitened"))
        return ProjectedInverse(self.projection, second_moment(columns) / self.n, 1.0, shift)


@dataclass(frozen=True, eq=False)
class ProjectedInverse:
    """(M + λ)⁻¹ between projected gradients.

    Args:
        projection: of the gradients.
        matrix: M, `(k, k)`, float64.
        added: λ.
        shift: Λ, by whose root gradients are divided before they are projected; None where there is none.
    """

    projection: Projection
    matrix: Float[Tensor, "k k"]
    added: float
    shift: Shift | None = field(default=None)

    def against(self, queries: Gradients) -> Scorer:
        """Return a function: gradients of m samples → ∇ℓ_qᵀ (H + Λ)⁻¹ ∇ℓ_i, `(q, m)`."""
        projected = self.project(queries)
        solved = self.solve(projected).to(projected)
        return lambda rows: solved @ self.project(rows).T

    def squares(self, rows: Gradients) -> Float[Tensor, " n"]:
        """Return ∇ℓ_iᵀ (H + Λ)⁻¹ ∇ℓ_i of each sample, `(n,)`."""
        projected = self.project(rows)
        return (projected * self.solve(projected).to(projected)).sum(1)

    def project(self, rows: Gradients) -> Float[Tensor, "n k"]:
        """Return each sample's projected gradient."""
        return self.projection(rows if self.shift is None else whiten(rows, self.shift))

    def solve(self, projected: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return (M + λ)⁻¹ φ of each projected gradient, on the CPU in float64."""
        return torch.cholesky_solve(projected.cpu().double().T, self._factor).T

    @property
    def halves(self) -> tuple[ProjectedInverse, ProjectedInverse]:
        """Two inverses, each from a projection to half as many numbers: their agreement measures the error of one."""
        first, second = (
            replace(self, projection=half, matrix=half.folded(half.folded(self.matrix).T))
            for half in self.projection.halves
        )
        return first, second

    @cached_property
    def _factor(self) -> Tensor:
        return damped_factor(self.matrix, self.added)


def damped_factor(matrix: Float[Tensor, "k k"], added: float) -> Float[Tensor, "k k"]:
    """Return the Cholesky factor of a matrix with a number added to its diagonal."""
    damped = matrix.clone()
    damped.diagonal().add_(added)
    return cholesky(damped)


def second_moment(batches: Iterable[Tensor]) -> Float[Tensor, "k k"]:
    """Return Σ φφᵀ over all rows of all batches, in float64."""
    products = ((rows.T @ rows).cpu().double() for rows in _pile(batches))
    total = next(products, None)
    if total is None:
        raise ValueError("train: expected samples to take the curvature from, got none")
    for product in products:
        total.add_(product)
    return total


def _pile(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield many rows at a time: the product of one batch's costs less than adding it up in float64."""
    pile: list[Tensor] = []
    for batch in batches:
        pile.append(batch)
        if sum(map(len, pile)) >= PILED_ROWS:
            yield torch.cat(pile)
            pile = []
    if pile:
        yield torch.cat(pile)
