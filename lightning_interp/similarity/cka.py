"""Centred kernel alignment."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lightning_interp.records import Caution, Representation
from lightning_interp.similarity.representation import prepare, same_samples


@dataclass(frozen=True)
class CKA:
    """Linear centred kernel alignment.

    CKA(X, Y) = ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) for centred X, Y. With `debiased`, each of the three terms is
    the U-statistic HSIC₁ of Song et al., which is 0 in the mean for independent features of any width; it may
    be negative and is not clamped. In [0, 1] otherwise, 1 meaning equal up to rotation and one common scale.
    Not invariant to general linear maps. The plain one is biased upwards where d is not much smaller than n:
    independent features of d = 2048 at n = 512 score 0.80.

    Reference: Kornblith et al., Similarity of Neural Network Representations Revisited, 2019; Song et al.,
    Feature Selection via Dependence Maximization, 2012.

    Args:
        debiased: use the unbiased estimate of HSIC; needs n ≥ 4.

    >>> import torch
    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> round(CKA()(x, 2 * x + 7).item(), 6)
    1.0
    """

    debiased: bool = False

    @property
    def name(self) -> str:
        """Tag of the measure."""
        return "CKA_debiased" if self.debiased else "CKA"

    def __call__(self, x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
        """Compare two sets of features of the same samples; NaN if one is constant."""
        return self.between(prepare(x), prepare(y))

    def between(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Compare two prepared layers."""
        same_samples(x, y)
        hsic = _hsic_unbiased if self.debiased else _hsic
        return hsic(x, y) / (hsic(x, x) * hsic(y, y)).clamp(min=0).sqrt()

    def caution(self, x: Representation) -> Caution | None:
        """Say when a comparison with this layer should not be trusted."""
        if self.debiased or x.width < x.n:
            return None
        return Caution("width ≥ n, biased upwards, compare with the debiased values", f"d = {x.width:,}")


def _hsic(x: Representation, y: Representation) -> Float[Tensor, ""]:
    """Return tr(K L) = ‖YᵀX‖²_F, from the singular vectors and values."""
    return (x.s[:, None] * (x.u.T @ y.u) * y.s).square().sum()


def _hsic_unbiased(x: Representation, y: Representation) -> Float[Tensor, ""]:
    """Return n(n−3) HSIC₁ (Song et al. 2012, eq. 5) from Gram matrices with zeroed diagonals.

    With a, b the diagonals of the centred Grams K, L: K̃ = K − diag a has rows sums −a, so every term of the
    estimator follows from tr(K L), a and b, without forming an n × n matrix.
    """
    n = x.n
    if n < 4:
        raise ValueError(f"CKA(debiased=True): expected at least 4 samples, got {n}")
    a, b = (x.u * x.s).square().sum(1), (y.u * y.s).square().sum(1)
    trace = _hsic(x, y) - a @ b
    totals = a.sum() * b.sum() / ((n - 1) * (n - 2))
    return trace + totals - 2 / (n - 2) * (a @ b)
