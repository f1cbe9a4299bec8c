"""LiSSA: the inverse as a series, each of its terms from another mini-batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lightning_interp.checks import check_counts
from lightning_interp.data.samples import Samples
from lightning_interp.influence.curvature.iterative import FittedIterative, IterativeSolver, Solution, mean_eigenvalue
from lightning_interp.influence.curvature.operator import Operator
from lightning_interp.influence.gradients.reader import Reader
from lightning_interp.progress import quiet

BATCHES_TRIED = 8  # mini-batches that the largest eigenvalue is taken over: with the iterations, 80 products
POWER_ITERATIONS = 10  # a rough eigenvalue is enough: the series converges from half of the largest on
BOUND_SLACK = 1.01  # factor on the bound that detects divergence, for rounding


@dataclass(frozen=True)
class LiSSA:
    """The whole generalised Gauss–Newton matrix by a stochastic series: h ← ∇ℓ_q + (I − (H_batch + Λ)/s) h.

    h/s tends to (H + Λ)⁻¹ ∇ℓ_q. A direction of eigenvalue e needs s/(e + λ) steps, so that many steps act as more
    damping would; the residual of the result, over all samples, is a note. Conjugate gradients get further with fewer
    products; this is here for comparison with published numbers.

    Reference: Agarwal, Bullins & Hazan, Second-Order Stochastic Optimization for Machine Learning in Linear Time, 2017;
    Koh & Liang, Understanding Black-box Predictions via Influence Functions, 2017.

    Args:
        iterations: terms of the series.
        repeats: series that are averaged.
        scale: s, above half the largest eigenvalue of any mini-batch's damped matrix; the largest of 8 mini-batches, by
            power iteration, when None.
        batch_size: samples a term.
        seed: of the mini-batches.
    """

    iterations: int = 1000
    repeats: int = 1
    scale: float | None = None
    batch_size: int = 64
    seed: int = 0

    solves_per_query: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts("LiSSA", iterations=self.iterations, repeats=self.repeats, batch_size=self.batch_size)
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"LiSSA(scale=...): expected a positive number or None, got {self.scale}")

    def check(self, parameters: int) -> None:
        """Accept any number of parameters: memory grows with it, times the number of queries."""

    def fit(self, reader: Reader, samples: Samples) -> FittedIterative:
        """Estimate the mean eigenvalue alone: the series is summed when queries come."""
        operator = Operator.of(replace(reader, progress=quiet), samples)
        solver_of = partial(self._prepared, reader)
        return FittedIterative(operator, mean_eigenvalue(reader, samples, self.seed), solver_of)

    def _prepared(self, reader: Reader, operator: Operator) -> IterativeSolver:
        draws = torch.Generator().manual_seed(self.seed)
        scale = self.scale or largest_eigenvalue(operator, self.batch_size, draws)

        def solver(queries: Tensor) -> Solution:
            # Seeded for each set of queries, so that the same queries get the same scores.
            draws = torch.Generator().manual_seed(self.seed)
            series = [self._summed(reader, operator, queries, scale, draws) for _ in range(self.repeats)]
            solutions = torch.stack(series).mean(0)
            residual_norms = (queries - operator(solutions)).norm(dim=1)
            residuals = residual_norms / queries.norm(dim=1).clamp(min=torch.finfo(queries.dtype).tiny)
            return Solution(solutions, residuals, (self._note(residuals, scale),))

        return solver

    def _summed(
        self, reader: Reader, operator: Operator, queries: Tensor, scale: float, draws: torch.Generator
    ) -> Tensor:
        """Return one series.

        Raises:
            FloatingPointError: it diverged: |h| is above |∇ℓ_q| s/λ, the most that it can be if no term grows.
        """
        smallest_damping = float(operator.space.diagonal(operator.shift, queries).min())
        largest_norms = BOUND_SLACK * scale / smallest_damping * queries.norm(dim=1)
        vectors = queries
        batches = mini_batches(len(operator.samples), self.batch_size, draws)
        for step, _ in enumerate(reader.progress(range(self.iterations), self.iterations, "LiSSA"), 1):
            vectors = queries + vectors - operator.on(next(batches))(vectors) / scale
            if not bool((vectors.norm(dim=1) <= largest_norms).all()):
                raise FloatingPointError(
                    f"LiSSA(scale={scale:.3g}): the series diverged at step {step}; expected a scale above half the"
                    " largest eigenvalue of every mini-batch's damped curvature; pass a larger scale= or batch_size="
                )
        return vectors / scale

    def _note(self, residuals: Tensor, scale: float) -> str:
        return (
            f"LiSSA: relative residual {float(residuals.max()):.1e} (median {float(residuals.median()):.1e}) after"
            f" {self.iterations} iterations of scale {scale:.3g}, {self.repeats} times"
        )


def largest_eigenvalue(operator: Operator, batch_size: int, draws: torch.Generator) -> float:
    """Return the largest eigenvalue that 10 power iterations find in each of 8 mini-batches' matrices."""
    batches = mini_batches(len(operator.samples), batch_size, draws)
    start = torch.randn(1, operator.space.size, generator=draws).to(operator.space.parameters[0].device)
    eigenvalues = []
    for _ in range(BATCHES_TRIED):
        batch_operator, vector = operator.on(next(batches)), start
        for _ in range(POWER_ITERATIONS):
            vector = batch_operator(vector / vector.norm())
        eigenvalues.append(float(vector.norm()))
    return max(eigenvalues)


def mini_batches(n: int, count: int, draws: torch.Generator) -> Iterator[list[int]]:
    """Yield mini-batches of n samples without end, each sample once before any comes again."""
    while True:
        yield from (batch.tolist() for batch in torch.randperm(n, generator=draws).split(count))
