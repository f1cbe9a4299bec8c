"""No curvature: H + Λ → I, the plain dot product of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_interp.data.samples import Samples
from lightning_interp.influence.curvature.curvature import Gradients, Scorer, Shift, sum_of
from lightning_interp.influence.gradients.factored import dot_products
from lightning_interp.influence.gradients.reader import Reader


@dataclass(frozen=True)
class IdentityCurvature:
    """Score by ∇ℓ_q · ∇ℓ_i alone: the influence of one step of gradient descent, without a unit.

    Where each layer sees a sample once, dot products of gradients factor and nothing of the parameters' size is made.

    Reference: Charpiat et al., Input Similarity from the Neural Network Perspective, 2019.
    """

    needs_outputs: ClassVar[bool] = False
    in_loss_unit: ClassVar[bool] = False

    def check(self, parameters: int) -> None:
        """Accept any number of parameters."""

    def fit(self, reader: Reader, samples: Samples) -> FittedIdentity:
        """Estimate nothing."""
        return FittedIdentity()


@dataclass(frozen=True)
class FittedIdentity:
    """The identity."""

    n: int = 0
    mean_eigenvalue: float = 1.0
    notes: tuple[str, ...] = ()

    def inverse(self, shift: Shift) -> FittedIdentity:
        """Return the identity, for any Λ."""
        return self

    def against(self, queries: Gradients) -> Scorer:
        """Return a function: gradients of m samples → dot products, `(q, m)`."""
        return lambda rows: sum_of(dot_products(queries[block], row) for block, row in rows.items())

    def solve(self, rows: Gradients) -> dict[str, Tensor]:
        """Return the gradients themselves: block → `(q, groups, o, i)`."""
        return {block: row.gradients() for block, row in rows.items()}

    def squares(self, rows: Gradients) -> Tensor:
        """Return each sample's squared gradient norm, `(n,)`."""
        return sum_of(row.squared_norms() for row in rows.values())
