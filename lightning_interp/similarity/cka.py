"""Centred kernel alignment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.records import Caution, Representation
from lightning_interp.similarity.kernel import Kernel, LinearKernel, RBFKernel, centred_gram
from lightning_interp.similarity.representation import prepare, same_samples


@dataclass(frozen=True)
class CKA:
    """Centred kernel alignment, linear unless told otherwise.

    CKA = HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)), HSIC(K, L) = tr(K H L H); for the linear kernel
    ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) of centred X, Y. With `debiased`, each of the three terms is the U-statistic HSIC₁ of
    Song et al., which is 0 in the mean for independent features of any width; it may be negative and is not clamped. In
    [0, 1] otherwise, 1 meaning equal up to rotation and one common scale. Not invariant to general linear maps. The
    plain one is biased upwards where d is not much smaller than n: independent features of d = 2048 at n = 512
    score 0.80.

    Reference: Kornblith et al., Similarity of Neural Network Representations Revisited, 2019; Song et al.,
    Feature Selection via Dependence Maximization, 2012.

    Args:
        kernel: `LinearKernel()` or `RBFKernel(median_fraction=...)`.
        debiased: use the unbiased estimate of HSIC; needs n ≥ 4.

    >>> import torch
    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> round(CKA()(x, 2 * x + 7).item(), 6)
    1.0
    """

    kernel: Kernel = LinearKernel()
    debiased: bool = False

    @property
    def name(self) -> str:
        """Tag of the measure."""
        return f"CKA{_kernel_name(self.kernel)}{'_debiased' if self.debiased else ''}"

    def __call__(self, x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
        """Compare two sets of features of the same samples; NaN if one is constant."""
        return self.between(prepare(x), prepare(y))

    def between(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Compare two prepared layers."""
        same_samples(x, y)
        if self.debiased and x.n < 4:
            raise ValueError(f"CKA(debiased=True): expected at least 4 samples, got {x.n}")
        xy, xx, yy = self._linear(x, y) if self.kernel == LinearKernel() else self._by_gram(x, y)
        return xy / (xx * yy).clamp(min=0).sqrt()

    def caution(self, x: Representation) -> Caution | None:
        """Say when a comparison with this layer should not be trusted."""
        if self.debiased or x.width < x.n:
            return None
        return Caution("width ≥ n, biased upwards, compare with the debiased values", f"d = {x.width:,}")

    def _linear(self, x: Representation, y: Representation) -> tuple[Tensor, Tensor, Tensor]:
        hsic = _hsic_unbiased if self.debiased else _hsic
        return hsic(x, y), hsic(x, x), hsic(y, y)

    def _by_gram(self, x: Representation, y: Representation) -> tuple[Tensor, Tensor, Tensor]:
        prepare_gram = _u_centred if self.debiased else centred_gram
        k, m = prepare_gram(self.kernel(x)), prepare_gram(self.kernel(y))
        return (k * m).sum(), (k * k).sum(), (m * m).sum()


def _hsic(x: Representation, y: Representation) -> Float[Tensor, ""]:
    """Return tr(K L) = ‖YᵀX‖²_F, from the singular vectors and values."""
    return (x.s[:, None] * (x.u.T @ y.u) * y.s).square().sum()


def _hsic_unbiased(x: Representation, y: Representation) -> Float[Tensor, ""]:
    """Return n(n−3) HSIC₁ (Song et al. 2012, eq. 5) from Gram matrices with zeroed diagonals.

    With a, b the diagonals of the centred Grams K, L: K̃ = K − diag a has row sums −a, so every term of the
    estimator follows from tr(K L), a and b, without forming an n × n matrix.
    """
    n = x.n
    a, b = (x.u * x.s).square().sum(1), (y.u * y.s).square().sum(1)
    trace = _hsic(x, y) - a @ b
    totals = a.sum() * b.sum() / ((n - 1) * (n - 2))
    return trace + totals - 2 / (n - 2) * (a @ b)


def _u_centred(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return the U-centred matrix, whose inner products are n(n−3) HSIC₁ (Székely & Rizzo 2014)."""
    n = len(gram)
    hollow = gram - torch.diag(gram.diagonal())
    rows = hollow.sum(1) / (n - 2)
    centred = hollow - rows[:, None] - rows + hollow.sum() / ((n - 1) * (n - 2))
    return centred - torch.diag(centred.diagonal())


def _kernel_name(kernel: Kernel) -> str:
    if isinstance(kernel, LinearKernel):
        return ""
    return f"_RBF_{kernel.median_fraction}" if isinstance(kernel, RBFKernel) else f"_{type(kernel).__name__}"
