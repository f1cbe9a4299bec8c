"""Projection-weighted canonical correlation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.similarity.cca import too_few_samples
from lightning_interp.similarity.representation import Form, Representation, centre, double, prepare, same_samples
from lightning_interp.similarity.results import Caution


@dataclass(frozen=True)
class PWCCA:
    """Projection-weighted canonical correlation analysis: canonical correlations weighted by what they explain.

    Σ α_i ρ_i / Σ α_i with α_i = Σ_j |⟨h_i, x_j⟩|, h_i the canonical directions of one side and x_j its centred neurons.
    The weights come from the narrower side, from X where both are as wide. In [0, 1]. It depends on the neuron basis:
    rotating the side that gives the weights moves it, so that side must have kept its features. NaN if it has not, if a
    side is constant, or has rank ≥ n − 1.

    Reference: Morcos et al., Insights on Representational Similarity in Neural Networks with Canonical Correlation,
    2018.
    """

    needs: ClassVar[Form] = "features"

    @property
    def name(self) -> str:
        """Tag of the measure."""
        return "PWCCA"

    def __call__(self, x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
        """Compare two sets of features of the same samples."""
        return self.between(prepare(x), prepare(y))

    def between(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Compare two prepared layers."""
        same_samples(x, y)
        weigh_by_y = y.width < x.width
        features = y.features if weigh_by_y else x.features
        if features is None or min(x.rank, y.rank) == 0 or max(x.rank, y.rank) >= x.n - 1:
            return torch.tensor(torch.nan, dtype=torch.float64)
        left, correlations, right = torch.linalg.svd(x.u.T @ y.u, full_matrices=False)
        directions = y.u @ right.T if weigh_by_y else x.u @ left
        weights = (directions.T @ double(centre(features))).abs().sum(1)
        return (weights * correlations.clamp(max=1)).sum() / weights.sum()

    def caution(self, x: Representation) -> Caution | None:
        """Say when a comparison with this layer should not be trusted."""
        if x.rank >= x.n - 1:
            return Caution("not defined, rank n − 1 or more", f"rank {x.rank}")
        if x.features is None:
            return Caution('not defined without the neurons, which store="activations" keeps', f"d = {x.width:,}")
        return too_few_samples(x, x.rank)
