"""Orthogonal Procrustes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.similarity.representation import Representation, prepare, same_samples
from lightning_interp.similarity.results import Caution


@dataclass(frozen=True)
class Procrustes:
    """Similarity after the best rotation of one set of features onto the other.

    cos θ = ‖XᵀY‖_* / (‖X‖_F ‖Y‖_F) for centred X, Y, the sum of singular values over the product of norms; the angle
    θ is a metric on shapes. In [0, 1], 1 meaning equal up to rotation and one common scale. Not invariant to general
    linear maps. Biased upwards for wide layers: independent features of d = 2048 at n = 512 score 0.94. Each pair
    needs a singular value decomposition of its own.

    Reference: Williams et al., Generalized Shape Metrics on Neural Representations, 2021.

    Args:
        angle: return θ in radians, 0 meaning the same, instead of cos θ.
    """

    angle: bool = False

    symmetric: ClassVar[bool] = True

    @property
    def distance(self) -> bool:
        """Whether 0 means the same."""
        return self.angle

    @property
    def name(self) -> str:
        """Tag of the measure."""
        return "Procrustes_angle" if self.angle else "Procrustes_similarity"

    def __call__(self, x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
        """Compare two sets of features of the same samples; NaN if one is constant."""
        return self.between(prepare(x), prepare(y))

    def between(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Compare two prepared layers."""
        same_samples(x, y)
        if not x.rank or not y.rank:
            return torch.tensor(torch.nan, dtype=torch.float64, device=x.u.device)
        nuclear = torch.linalg.svdvals(x.s[:, None] * (x.u.T @ y.u) * y.s).sum()
        cosine = nuclear / (x.s.norm() * y.s.norm())
        return cosine.clamp(max=1).arccos() if self.angle else cosine

    def caution(self, x: Representation) -> Caution | None:
        """Say when a comparison with this layer should not be trusted."""
        if x.width < x.n:
            return None
        return Caution("width ≥ n, unrelated layers look alike, compare with the values by chance", f"d = {x.width:,}")
