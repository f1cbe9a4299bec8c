"""Canonical correlation, after the reduction that SVCCA makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.records import Caution, Representation
from lightning_interp.similarity.representation import prepare, same_samples


@dataclass(frozen=True)
class SVCCA:
    """Singular vector canonical correlation analysis: the mean canonical correlation ρ̄.

    Each side keeps the smallest number k of singular directions with Σ_{≤k} s² ≥ variance · Σ s²; the canonical
    correlations of what is kept are the singular values of U_xᵀ U_y, and their mean over min(k_x, k_y) is
    returned. In [0, 1]; 1 means equal up to rotation and one common scale (of the kept directions: up to any
    invertible linear map of them). Independent features score about √(k/n), not 0: with fewer than 10 samples
    per kept direction read it with care; at k ≥ n − 1 it is 1 for any two layers, and NaN is returned.

    Reference: Raghu et al., SVCCA: Singular Vector Canonical Correlation Analysis for Deep Learning Dynamics
    and Interpretability, 2017.

    Args:
        variance: share of the variance to keep on each side, in (0, 1].
    """

    variance: float = 0.99

    def __post_init__(self) -> None:
        if not 0 < self.variance <= 1:
            raise ValueError(f"SVCCA(variance=...): expected a share in (0, 1], got {self.variance}")

    @property
    def name(self) -> str:
        """Tag of the measure."""
        return f"SVCCA_{self.variance}"

    def __call__(self, x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
        """Compare two sets of features of the same samples; NaN if one is constant or k ≥ n − 1."""
        return self.between(prepare(x), prepare(y))

    def between(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Compare two prepared layers."""
        same_samples(x, y)
        kx, ky = self.kept(x), self.kept(y)
        if min(kx, ky) == 0 or max(kx, ky) >= x.n - 1:
            return torch.tensor(torch.nan, dtype=torch.float64, device=x.u.device)
        correlations = torch.linalg.svdvals(x.u[:, :kx].T @ y.u[:, :ky])
        return correlations.clamp(max=1).mean()

    def kept(self, x: Representation) -> int:
        """Return k, the number of singular directions that this layer keeps."""
        shares = x.s.double().square().cumsum(0)
        return int((shares < self.variance * shares[-1]).sum()) + 1 if x.rank else 0

    def caution(self, x: Representation) -> Caution | None:
        """Say when a comparison with this layer should not be trusted."""
        k = self.kept(x)
        if k >= x.n - 1:
            return Caution("not defined, keeps n − 1 directions or more", f"k = {k}")
        if x.n < 10 * k:
            return Caution("fewer than 10 samples per kept direction, unrelated layers score high too", f"k = {k}")
        return None
