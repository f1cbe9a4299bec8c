"""Curvature that is never inverted: a linear system is solved for each query."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from lightning_interp.data.samples import Samples
from lightning_interp.influence.curvature.curvature import Gradients, Shift, sum_of
from lightning_interp.influence.curvature.gauss_newton import flatten
from lightning_interp.influence.curvature.operator import Operator
from lightning_interp.influence.gradients.reader import Reader

COLUMNS_FOR_MEAN_EIGENVALUE = 256  # as many backwards at most: only the size matters, for damping


class Solution(NamedTuple):
    """What a solver found of (H + Λ) x = b for each query.

    Args:
        vectors: x, `(q, p)`.
        residuals: |b − (H + Λ) x| / |b| of each query, `(q,)`.
        notes: what to say of them.
    """

    vectors: Float[Tensor, "q p"]
    residuals: Float[Tensor, " q"]
    notes: tuple[str, ...]


IterativeSolver = Callable[[Tensor], Solution]


@dataclass(frozen=True, eq=False)
class FittedIterative:
    """The matrix as an operator, and how systems of it are solved.

    Args:
        operator: products with H.
        mean_eigenvalue: over all eigenvalues.
        prepare: the damped operator → a solver.
        notes: what to say of it before any system is solved.
    """

    operator: Operator
    mean_eigenvalue: float
    prepare: Callable[[Operator], IterativeSolver]
    notes: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """Number of samples used."""
        return len(self.operator.samples)

    def inverse(self, shift: Shift) -> IterativeInverse:
        """Return (H + Λ)⁻¹, which solves when it is asked."""
        damped = self.operator.damped(shift)
        return IterativeInverse(damped, self.prepare(damped))


@dataclass(frozen=True, eq=False)
class IterativeInverse:
    """(H + Λ)⁻¹, one system a query.

    Args:
        operator: products with H + Λ.
        solver: of its systems.
    """

    operator: Operator
    solver: IterativeSolver

    def against(self, queries: Gradients) -> Solved:
        """Solve for all queries, and return a function: gradients of m samples → ∇ℓ_qᵀ (H + Λ)⁻¹ ∇ℓ_i, `(q, m)`."""
        space = self.operator.space
        solution = self.solver(flatten({name: queries[name] for name in space.coverage.blocks}))
        return Solved(space.blocks(solution.vectors), solution.residuals, solution.notes)

    def squares(self, rows: Gradients) -> Tensor:
        """Refuse: it would be one system for each training sample.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "self_influence, leverage: this curvature would solve one system for each training sample;"
            " use EKFAC() or GaussNewton(columns=1024)"
        )


@dataclass(frozen=True, eq=False)
class Solved:
    """Scores by solved queries.

    Args:
        solutions: block → (H + Λ)⁻¹ ∇ℓ_q, `(q, groups, o, i)`.
        residuals: relative, of each query, `(q,)`.
        notes: what to say of them.
    """

    solutions: Mapping[str, Tensor]
    residuals: Tensor
    notes: tuple[str, ...]

    def __call__(self, rows: Gradients) -> Tensor:
        """Return ∇ℓ_qᵀ (H + Λ)⁻¹ ∇ℓ_i, `(q, m)`."""
        return sum_of(rows[block].dot(vectors) for block, vectors in self.solutions.items())


def mean_eigenvalue(reader: Reader, samples: Samples, seed: int) -> float:
    """Return the mean eigenvalue of H, unbiased, from 256 of its columns."""
    columns = reader.sample_columns(samples, COLUMNS_FOR_MEAN_EIGENVALUE, seed)
    passed = reader.gradients_of_columns(samples, columns, "curvature, mean eigenvalue")
    total = sum(float(row.squared_norms().sum()) for rows in passed for row in rows.values())
    return total / (columns.n * reader.coverage.size)
