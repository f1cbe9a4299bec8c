"""Curvature of the training loss, from which influence takes its metric."""

from typing import Protocol, runtime_checkable

from lightning_interp.influence.curvature.ekfac import EKFAC, FittedEKFAC, Traces
from lightning_interp.influence.curvature.gauss_newton import FittedGaussNewton, GaussNewton
from lightning_interp.influence.gradients import Gradients
from lightning_interp.task import Task


@runtime_checkable
class Fitted(Protocol):
    """A curvature estimated from data."""

    @property
    def n(self) -> int:
        """Number of samples used."""

    @property
    def mean_eigenvalue(self) -> float:
        """Mean over all eigenvalues."""

    def solve(self, gradients: Gradients, damping: float) -> Gradients:
        """Return (H + λI)⁻¹ v for gradients `(q, groups, o, i)` of each layer."""


@runtime_checkable
class Curvature(Protocol):
    """How the curvature is estimated; `EKFAC` and `GaussNewton` are such."""

    @property
    def samples(self) -> int | None:
        """Training samples that it is estimated from; all when None."""

    def check(self, parameters: int) -> None:
        """Raise a ValueError if it cannot be estimated for so many parameters."""

    def fit(self, traces: Traces, task: Task) -> Fitted:
        """Estimate it from traces of batches."""


__all__ = ["EKFAC", "Curvature", "Fitted", "FittedEKFAC", "FittedGaussNewton", "GaussNewton"]
