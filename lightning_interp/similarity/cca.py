"""Canonical correlation, plain and after the reduction that SVCCA makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.similarity.representation import Representation, centre, double, prepare, same_samples
from lightning_interp.similarity.results import Caution

Summary = Literal["mean", "mean_squared", "largest"]


class CanonicalDirections(NamedTuple):
    """Where two sets of features agree: pairs of directions, the most correlated first.

    `(X − mean) @ weights_x` are `variates_x`, of unit length, and `variates_x[:, i] @ variates_y[:, i]` is
    `correlations[i]`; different pairs are uncorrelated.

    Args:
        correlations: ρ_i, `(k,)`, descending.
        weights_x: of x's neurons, `(d1, k)`.
        weights_y: of y's neurons, `(d2, k)`.
        variates_x: each sample along x's directions, `(n, k)`.
        variates_y: each sample along y's directions, `(n, k)`.
    """

    correlations: Float[Tensor, " k"]
    weights_x: Float[Tensor, "d1 k"]
    weights_y: Float[Tensor, "d2 k"]
    variates_x: Float[Tensor, "n k"]
    variates_y: Float[Tensor, "n k"]


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

    symmetric: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Tag of the measure."""
        return f"CCA_{self.summary}"

    def __call__(self, x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
        """Compare two sets of features of the same samples; NaN if one is constant or rank ≥ n − 1."""
        return self.between(prepare(x), prepare(y))

    def between(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Compare two prepared layers."""
        return _summarise(self.summary, canonical_correlations(x, y, x.rank, y.rank))

    def directions(self, x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> CanonicalDirections:
        """Return the canonical directions of two sets of features; with rank ≥ n − 1 they mean nothing."""
        a, b = prepare(x), prepare(y)
        return _directions(x, y, a, b, a.rank, b.rank)

    def chance(self, x: Representation, y: Representation) -> float | None:
        """Return the exact mean over permutations of y's samples; None for summaries other than "mean_squared"."""
        return _r_squared_by_chance(x.rank, y.rank, x.n) if self.summary == "mean_squared" else None

    def kept(self, x: Representation) -> int:
        """Return the number of directions of this layer that enter: all."""
        return x.rank

    def caution(self, x: Representation) -> Caution | None:
        """Say when a comparison with this layer should not be trusted."""
        return too_few_samples(x, x.rank)


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

    symmetric: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Tag of the measure."""
        return f"SVCCA_{self.variance}" + ("" if self.summary == "mean" else f"_{self.summary}")

    def __call__(self, x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
        """Compare two sets of features of the same samples; NaN if one is constant or k ≥ n − 1."""
        return self.between(prepare(x), prepare(y))

    def between(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Compare two prepared layers."""
        return _summarise(self.summary, canonical_correlations(x, y, self.kept(x), self.kept(y)))

    def directions(self, x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> CanonicalDirections:
        """Return the canonical directions within what each side keeps."""
        a, b = prepare(x), prepare(y)
        return _directions(x, y, a, b, self.kept(a), self.kept(b))

    def chance(self, x: Representation, y: Representation) -> float | None:
        """Return the exact mean over permutations of y's samples; None for summaries other than "mean_squared"."""
        return _r_squared_by_chance(self.kept(x), self.kept(y), x.n) if self.summary == "mean_squared" else None

    def kept(self, x: Representation) -> int:
        """Return k, the number of singular directions that this layer keeps."""
        shares = x.s.double().square().cumsum(0)
        return int((shares < self.variance * shares[-1]).sum()) + 1 if x.rank else 0

    def caution(self, x: Representation) -> Caution | None:
        """Say when a comparison with this layer should not be trusted."""
        return too_few_samples(x, self.kept(x))


def canonical_correlations(x: Representation, y: Representation, kx: int, ky: int) -> Float[Tensor, " k"]:
    """Return the canonical correlations of each side's `k` strongest directions, descending.

    Returns:
        min(kx, ky) numbers in [0, 1]; one NaN where they are not defined (a constant layer, or k ≥ n − 1).
    """
    same_samples(x, y)
    if not _are_defined(kx, ky, x.n):
        return torch.full((1,), torch.nan, dtype=torch.float64, device=x.u.device)
    # Rounding may leave a correlation above 1.
    return torch.linalg.svdvals(x.u[:, :kx].T @ y.u[:, :ky]).clamp(max=1)


def r_squared_null(kx: int, ky: int, n: int) -> float:
    """Return the mean of R²_CCA (the mean ρ²) of independent features of ranks kx and ky: max(kx, ky) / (n − 1).

    For SVCCA the ranks are the numbers of directions that it keeps.
    """
    return max(kx, ky) / (n - 1)


def _r_squared_by_chance(kx: int, ky: int, n: int) -> float:
    return r_squared_null(kx, ky, n) if _are_defined(kx, ky, n) else float("nan")


def _are_defined(kx: int, ky: int, n: int) -> bool:
    """Say whether two layers of such ranks have canonical correlations: neither is constant, nor fills the space."""
    return min(kx, ky) > 0 and max(kx, ky) < n - 1


def _directions(
    x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"], a: Representation, b: Representation, ka: int, kb: int
) -> CanonicalDirections:
    same_samples(a, b)
    left, correlations, right = torch.linalg.svd(a.u[:, :ka].T @ b.u[:, :kb], full_matrices=False)
    # V S⁻¹ = Xᵀ U S⁻²: the weights of the neurons without the right singular vectors.
    weights_x, weights_y = (
        double(centre(features)).T @ (r.u[:, :k] / r.s[:k].square() @ mixed)
        for features, r, k, mixed in ((x, a, ka, left), (y, b, kb, right.T))
    )
    variates_x, variates_y = a.u[:, :ka] @ left, b.u[:, :kb] @ right.T
    return CanonicalDirections(correlations.clamp(max=1), weights_x, weights_y, variates_x, variates_y)


def _summarise(summary: Summary, correlations: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    if summary == "largest":
        return correlations[0]
    return (correlations.square() if summary == "mean_squared" else correlations).mean()


def too_few_samples(x: Representation, k: int) -> Caution | None:
    """Say when k kept directions are too many for n samples."""
    if k >= x.n - 1:
        return Caution("not defined, keeps n − 1 directions or more", f"k = {k}")
    if x.n < 10 * k:
        return Caution("fewer than 10 samples per kept direction, unrelated layers score high too", f"k = {k}")
    return None


def _check_summary(owner: str, summary: str) -> None:
    if summary not in get_args(Summary):
        raise ValueError(f"{owner}(summary=...): expected one of {', '.join(get_args(Summary))}, got {summary!r}")
