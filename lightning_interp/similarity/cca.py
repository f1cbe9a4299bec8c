"""Canonical correlation, plain and after the reduction that SVCCA makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.records import Caution, Representation
from lightning_interp.similarity.representation import prepare, same_samples

Summary = Literal["mean", "mean_squared", "largest"]


@dataclass(frozen=True)
class CCA:
    """Canonical correlation analysis: the correlations ρ_i of the best-matching directions of two layers.

    They are the singular values of U_xᵀ U_y, the left singular vectors of the centred features; min(rank) of them.
    In [0, 1]; 1 for any two layers of which one is an invertible linear map of the other, or a part of it. Sensitive to
    directions of tiny variance, and inflated by few samples: the mean of ρ² is max(rank) / (n − 1) for independent
    features, and at rank ≥ n − 1 it is 1 for any two layers, so that NaN is returned.

    Reference: Hotelling, Relations Between Two Sets of Variates, 1936; R²_CCA in Kornblith et al. 2019.

    Args:
        summary: "mean" of ρ, "mean_squared" (R²_CCA), or the "largest" ρ.
    """

    summary: Summary = "mean"

    def __post_init__(self) -> None:
        _check_summary("CCA", self.summary)

    @property
    def name(self) -> str:
        """Tag of the measure."""
        return f"CCA_{self.summary}"

    def __call__(self, x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
        """Compare two sets of features of the same samples; NaN if one is constant or rank ≥ n − 1."""
        return self.between(prepare(x), prepare(y))

    def between(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Compare two prepared layers."""
        return _summarised(self.summary, canonical_correlations(x, y, x.rank, y.rank))

    def caution(self, x: Representation) -> Caution | None:
        """Say when a comparison with this layer should not be trusted."""
        return _too_few_samples(x, x.rank)


@dataclass(frozen=True)
class SVCCA:
    """Singular vector canonical correlation analysis: canonical correlations of the strongest directions.

    Each side keeps the smallest number k of singular directions with Σ_{≤k} s² ≥ variance · Σ s²; the canonical
    correlations of what is kept are the singular values of U_xᵀ U_y, summarised over min(k_x, k_y). In [0, 1]; 1 means
    equal up to rotation and one common scale (of the kept directions: up to any invertible linear map of them).
    Independent features score about √(k/n), not 0: with fewer than 10 samples per kept direction read it with care; at
    k ≥ n − 1 it is 1 for any two layers, and NaN is returned.

    Reference: Raghu et al., SVCCA: Singular Vector Canonical Correlation Analysis for Deep Learning Dynamics
    and Interpretability, 2017.

    Args:
        variance: share of the variance to keep on each side, in (0, 1].
        summary: "mean" of ρ, "mean_squared", or the "largest" ρ.
    """

    variance: float = 0.99
    summary: Summary = "mean"

    def __post_init__(self) -> None:
        if not 0 < self.variance <= 1:
            raise ValueError(f"SVCCA(variance=...): expected a share in (0, 1], got {self.variance}")
        _check_summary("SVCCA", self.summary)

    @property
    def name(self) -> str:
        """Tag of the measure."""
        return f"SVCCA_{self.variance}" + ("" if self.summary == "mean" else f"_{self.summary}")

    def __call__(self, x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
        """Compare two sets of features of the same samples; NaN if one is constant or k ≥ n − 1."""
        return self.between(prepare(x), prepare(y))

    def between(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Compare two prepared layers."""
        return _summarised(self.summary, canonical_correlations(x, y, self.kept(x), self.kept(y)))

    def kept(self, x: Representation) -> int:
        """Return k, the number of singular directions that this layer keeps."""
        shares = x.s.double().square().cumsum(0)
        return int((shares < self.variance * shares[-1]).sum()) + 1 if x.rank else 0

    def caution(self, x: Representation) -> Caution | None:
        """Say when a comparison with this layer should not be trusted."""
        return _too_few_samples(x, self.kept(x))


def canonical_correlations(x: Representation, y: Representation, kx: int, ky: int) -> Float[Tensor, " k"]:
    """Return the canonical correlations of each side's `k` strongest directions, descending.

    Returns:
        min(kx, ky) numbers in [0, 1]; one NaN where they are not defined (a constant layer, or k ≥ n − 1).
    """
    same_samples(x, y)
    if min(kx, ky) == 0 or max(kx, ky) >= x.n - 1:
        return torch.full((1,), torch.nan, dtype=torch.float64, device=x.u.device)
    return torch.linalg.svdvals(x.u[:, :kx].T @ y.u[:, :ky]).clamp(max=1)


def _summarised(summary: Summary, correlations: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    if summary == "largest":
        return correlations[0]
    return (correlations.square() if summary == "mean_squared" else correlations).mean()


def _too_few_samples(x: Representation, k: int) -> Caution | None:
    if k >= x.n - 1:
        return Caution("not defined, keeps n − 1 directions or more", f"k = {k}")
    if x.n < 10 * k:
        return Caution("fewer than 10 samples per kept direction, unrelated layers score high too", f"k = {k}")
    return None


def _check_summary(owner: str, summary: str) -> None:
    if summary not in get_args(Summary):
        raise ValueError(f"{owner}(summary=...): expected one of {', '.join(get_args(Summary))}, got {summary!r}")
