"""Conjugate gradients: exact influence of large networks, as far as the iterations go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.checks import check_counts
from lightning_interp.data.samples import Samples
from lightning_interp.influence.curvature.ekfac import EKFAC, FittedEKFAC
from lightning_interp.influence.curvature.iterative import FittedIterative, IterativeSolver, Solution, mean_eigenvalue
from lightning_interp.influence.curvature.kfac import KFAC
from lightning_interp.influence.curvature.operator import Operator
from lightning_interp.influence.gradients.reader import Reader


@dataclass(frozen=True)
class ConjugateGradient:
    """The whole generalised Gauss–Newton matrix, never written down: (H + Λ) x = ∇ℓ_q is solved for each query.

    All queries at once, each with iterations of its own: one iteration is a pass over the training samples with one
    vector a query. How far it got is a note of the result, and `residuals` of its scorer. Stopped early, it has the
    directions of large curvature right and those of small curvature not yet; the preconditioner, an estimate of the
    same matrix, lets them go together.

    Reference: Hestenes & Stiefel, Methods of Conjugate Gradients for Solving Linear Systems, 1952; Martens, Deep
    Learning via Hessian-free Optimization, 2010.

    Args:
        iterations: at most.
        tolerance: a query is done when |b − (H + Λ) x| is this share of |b|.
        preconditioner: an estimate of the same matrix; None is none.
        samples: training samples, evenly spread, that the matrix is a mean over; all when None.
        seed: of the columns that the mean eigenvalue is taken from, where there is no preconditioner.
    """

    iterations: int = 10
    tolerance: float = 1e-3
    preconditioner: EKFAC | KFAC | None = field(default_factory=EKFAC)
    samples: int | None = None
    seed: int = 0

    solves_per_query: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts("ConjugateGradient", iterations=self.iterations, samples=self.samples)
        if not 0 < self.tolerance < 1:
            raise ValueError(f"ConjugateGradient(tolerance=...): expected 0 < tolerance < 1, got {self.tolerance}")

    def check(self, parameters: int) -> None:
        """Accept any number of parameters: memory grows with it, times the number of queries."""

    def fit(self, reader: Reader, samples: Samples) -> FittedIterative:
        """Estimate the preconditioner alone: the systems are solved when queries come."""
        some = samples if self.samples is None else samples.spread(self.samples)
        operator = Operator.of(reader, some)
        if self.preconditioner is None:
            return FittedIterative(operator, mean_eigenvalue(reader, some, self.seed), partial(self._prepared, None))
        fitted = self.preconditioner.fit(reader, samples)
        return FittedIterative(operator, fitted.mean_eigenvalue, partial(self._prepared, fitted))

    def _prepared(self, fitted: FittedEKFAC | None, operator: Operator) -> IterativeSolver:
        precondition = torch.clone if fitted is None else _inverse_of(fitted, operator)

        def solver(queries: Tensor) -> Solution:
            return solve(operator, queries, precondition, self.iterations, self.tolerance)

        return solver


def solve(
    product: Callable[[Tensor], Tensor],
    right: Float[Tensor, "q p"],
    precondition: Callable[[Tensor], Tensor],
    iterations: int,
    tolerance: float,
) -> Solution:
    """Solve A x = b for many b at once by preconditioned conjugate gradients, each on its own.

    Args:
        product: vectors → A times each; A is symmetric and positive definite.
        right: b.
        precondition: vectors → M⁻¹ times each, M near A.
        iterations: at most.
        tolerance: a system is done when |b − A x| is this share of |b|.

    Raises:
        FloatingPointError: A is not positive definite.
    """
    found, rest = torch.zeros_like(right), right.clone()
    direction = precondition(rest)
    inside = _dots(rest, direction)
    scale = right.norm(dim=1).clamp(min=torch.finfo(right.dtype).tiny)
    taken = 0
    while taken < iterations and len(on := (rest.norm(dim=1) > tolerance * scale).nonzero()[:, 0]):
        along = direction[on]
        moved = product(along)
        curved = _dots(along, moved)
        if not bool((curved > 0).all()):
            raise FloatingPointError("damping: the damped curvature is not positive definite; pass a larger damping=")
        step = (inside[on] / curved)[:, None]
        found[on] += step * along
        rest[on] -= step * moved
        fresh = precondition(rest[on])
        size = _dots(rest[on], fresh)
        direction[on] = fresh + (size / inside[on])[:, None] * along
        inside[on] = size
        taken += 1
    if taken and float((rest.norm(dim=1) / scale).min()) < torch.finfo(right.dtype).eps ** 0.5:
        # The recurrence goes on shrinking below what rounding lets the solution itself reach.
        rest = right - product(found)
    residuals = rest.norm(dim=1) / scale
    return Solution(found, residuals, (_note(residuals, taken, tolerance),))


def _note(residuals: Tensor, taken: int, tolerance: float) -> str:
    above = int((residuals > tolerance).sum())
    said = (
        f"conjugate gradient: relative residual {float(residuals.max()):.1e} (median {float(residuals.median()):.1e})"
        f" after {taken} iterations"
    )
    if not above:
        return said
    return f"{said}: {above} of {len(residuals)} queries are above {tolerance:g}; raise iterations or damping"


def _dots(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(1)


def _inverse_of(fitted: FittedEKFAC, operator: Operator) -> Callable[[Tensor], Tensor]:
    inverse, space = fitted.inverse(operator.shift), operator.space
    return lambda vectors: space.joined(inverse.solved(space.blocks(vectors)))
