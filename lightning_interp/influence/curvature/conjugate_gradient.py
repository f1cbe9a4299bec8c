"""Conjugate gradients: influence by the exact curvature of large networks, up to a residual."""

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
from lightning_interp.influence.curvature.curvature import spread_out
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
    same matrix, makes both converge together.

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
        subset = spread_out(samples, self.samples)
        operator = Operator.of(reader, subset)
        if self.preconditioner is None:
            return FittedIterative(operator, mean_eigenvalue(reader, subset, self.seed), partial(self._prepared, None))
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
    solutions, residual = torch.zeros_like(right), right.clone()
    direction = precondition(residual)
    residual_dots = _dots(residual, direction)
    scale = right.norm(dim=1).clamp(min=torch.finfo(right.dtype).tiny)
    iterations_done = 0
    while iterations_done < iterations and len(unsolved := (residual.norm(dim=1) > tolerance * scale).nonzero()[:, 0]):
        # Solved systems drop out of the products, which are what an iteration costs.
        directions = direction[unsolved]
        products = product(directions)
        curvatures = _dots(directions, products)
        if not bool((curvatures > 0).all()):
            raise FloatingPointError("damping: the damped curvature is not positive definite; pass a larger damping=")
        step = (residual_dots[unsolved] / curvatures)[:, None]
        solutions[unsolved] += step * directions
        residual[unsolved] -= step * products
        preconditioned = precondition(residual[unsolved])
        fresh_dots = _dots(residual[unsolved], preconditioned)
        direction[unsolved] = preconditioned + (fresh_dots / residual_dots[unsolved])[:, None] * directions
        residual_dots[unsolved] = fresh_dots
        iterations_done += 1
    if iterations_done and float((residual.norm(dim=1) / scale).min()) < torch.finfo(right.dtype).eps ** 0.5:
        # Computed anew: the recurrence's residual shrinks below what rounding lets the solution itself reach.
        residual = right - product(solutions)
    relative_residuals = residual.norm(dim=1) / scale
    return Solution(solutions, relative_residuals, (_residual_note(relative_residuals, iterations_done, tolerance),))


def _residual_note(residuals: Tensor, iterations: int, tolerance: float) -> str:
    unsolved = int((residuals > tolerance).sum())
    note = (
        f"conjugate gradient: relative residual {float(residuals.max()):.1e} (median {float(residuals.median()):.1e})"
        f" after {iterations} iterations"
    )
    if not unsolved:
        return note
    return f"{note}: {unsolved} of {len(residuals)} queries are above {tolerance:g}; raise iterations or damping"


def _dots(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(1)


def _inverse_of(fitted: FittedEKFAC, operator: Operator) -> Callable[[Tensor], Tensor]:
    inverse, space = fitted.inverse(operator.shift), operator.space
    return lambda vectors: space.joined(inverse.solved(space.blocks(vectors)))
