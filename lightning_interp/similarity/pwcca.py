"""Projection-weighted canonical correlation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.similarity.representation import centre, double, prepare, same_samples


@dataclass(frozen=True)
class PWCCA:
    """Projection-weighted canonical correlation analysis: canonical correlations weighted by what they explain.

    Σ α_i ρ_i / Σ α_i with α_i = Σ_j |⟨h_i, x_j⟩|, h_i the canonical directions of one side and x_j its centred neurons.
    The weights come from the narrower side, from X where both are as wide. In [0, 1]. It depends on the neuron basis:
    rotating the side that gives the weights moves it, so it takes features, not stored representations. NaN if a side
    is constant or has rank ≥ n − 1.

    Reference: Morcos et al., Insights on Representational Similarity in Neural Networks with Canonical Correlation,
    2018.
    """

    @property
    def name(self) -> str:
        """Tag of the measure."""
        return "PWCCA"

    def __call__(self, x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
        """Compare two sets of features of the same samples."""
        a, b = prepare(x), prepare(y)
        same_samples(a, b)
        if min(a.rank, b.rank) == 0 or max(a.rank, b.rank) >= a.n - 1:
            return torch.tensor(torch.nan, dtype=torch.float64)
        left, correlations, right = torch.linalg.svd(a.u.T @ b.u, full_matrices=False)
        weigh_by_y = y.shape[1] < x.shape[1]
        directions = b.u @ right.T if weigh_by_y else a.u @ left
        weights = (directions.T @ double(centre(y if weigh_by_y else x))).abs().sum(1)
        return (weights * correlations.clamp(max=1)).sum() / weights.sum()
