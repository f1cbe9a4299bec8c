"""Centred kernel alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.similarity.kernels import Kernel, LinearKernel
from lightning_interp.similarity.representation import Form, Representation, prepare, recentred, same_samples
from lightning_interp.similarity.results import Caution
from lightning_interp.similarity.significance import FEWEST_FOR_JACKKNIFE, jackknife_standard_error
from lightning_interp.similarity.sketch import squared_norm


@dataclass(frozen=True)
class CKA:
    """Centred kernel alignment, linear by default.

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
    def needs(self) -> Form:
        """What a layer must keep: half precision is enough for the linear kernel, not for others."""
        form: Form = getattr(self.kernel, "needs", "scores")
        return form

    symmetric: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Tag of the measure."""
        return f"CKA{_kernel_suffix(self.kernel)}{'_debiased' if self.debiased else ''}"

    def __call__(self, x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
        """Compare two sets of features of the same samples; NaN if one is constant."""
        return self.between(prepare(x), prepare(y))

    def between(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Compare two prepared layers."""
        same_samples(x, y)
        if self.debiased and x.n < 4:
            raise ValueError(f"CKA(debiased=True): expected at least 4 samples, got {x.n}")
        # With the same random signs, a sketch compared with itself, the product has the same noise as the norms.
        same_signs = x.sketch and (x.sketch, x.signs) == (y.sketch, y.signs)
        norms = self._self_hsic(x) * self._self_hsic(y)
        product = self._self_hsic(x) if same_signs else self._hsic(x, y)
        return product / torch.where(norms > 0, norms, torch.nan).sqrt()

    def caution(self, x: Representation) -> Caution | None:
        """Say when a comparison with this layer should not be trusted."""
        if x.sketch:
            return Caution("an estimate from a sketch, off by about 1/√k or less", f"k = {x.sketch:,}")
        if self.debiased or x.width < x.n:
            return None
        return Caution("width ≥ n, biased upwards, compare with the debiased values", f"d = {x.width:,}")

    def chance(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Return the exact mean over all permutations of y's samples: `cka_null`."""
        return cka_null(self, x, y)

    def standard_error(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Return the jackknife standard error over samples: `cka_standard_error`.

        NaN for sketches, whose own error comes on top, and for fewer than 8 samples.
        """
        if x.n < FEWEST_FOR_JACKKNIFE or x.sketch or y.sketch:
            return torch.tensor(torch.nan)
        return cka_standard_error(self, x, y)

    def kernel_of(self, x: Representation) -> Float[Tensor, "n n"]:
        """Return the kernel's matrix of a layer, made once and shared by all measures with this kernel."""
        return x.derived(("kernel", self.kernel), self.kernel)

    def trace_and_norm(self, x: Representation) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the trace and the Frobenius norm of a layer's centred kernel matrix."""
        if self.kernel == LinearKernel():
            return _squared_lengths(x).sum(), _without_noise(x, _hsic(x, x)).sqrt()
        return x.derived((self, "trace and norm"), lambda layer: _trace_and_norm(recentred(self.kernel_of(layer))))

    def _self_hsic(self, x: Representation) -> Float[Tensor, ""]:
        return x.derived((self, "self HSIC"), lambda layer: _without_noise(layer, self._hsic(layer, layer)))

    def _hsic(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Return tr(K H L H), or n(n−3) HSIC₁."""
        if self.kernel == LinearKernel():
            return _hsic_unbiased(x, y) if self.debiased else _hsic(x, y)
        return torch.dot(*(z.derived((self, "kernel"), self._centred).flatten() for z in (x, y)))

    def _centred(self, x: Representation) -> Float[Tensor, "n n"]:
        return _u_centred(self.kernel_of(x)) if self.debiased else recentred(self.kernel_of(x))


def cka_null(measure: CKA, x: Representation, y: Representation) -> Float[Tensor, ""]:
    """Return the exact mean of CKA over all permutations of y's samples.

    tr K tr L / ((n − 1) ‖K‖_F ‖L‖_F) for centred Gram matrices; 0 for the debiased measure, whose numerator is 0 in the
    mean.

    Reference: Kazi-Aoual et al., Refined Approximations to Permutation Tests for Multivariate Inference, 1995.
    """
    same_samples(x, y)
    if measure.debiased:
        return torch.zeros((), dtype=torch.float64)
    (trace_x, norm_x), (trace_y, norm_y) = (measure.trace_and_norm(r) for r in (x, y))
    return trace_x * trace_y / ((x.n - 1) * norm_x * norm_y)


def cka_standard_error(measure: CKA, x: Representation, y: Representation) -> Float[Tensor, ""]:
    """Return the jackknife standard error of CKA: how much it varies with the choice of samples.

    √((n − 1)/n Σ_i (θ_i − θ̄)²), θ_i the value without sample i, all n of them from two n × n Gram matrices; a kernel's
    width stays that of all samples.

    Reference: Efron & Stein, The Jackknife Estimate of Variance, 1981.
    """
    return jackknife_standard_error(cka_without_each(measure, x, y))


def cka_without_each(measure: CKA, x: Representation, y: Representation) -> Float[Tensor, " n"]:
    """Return CKA with each of the n samples left out in turn."""
    same_samples(x, y)
    a, b = (_kernel_sums(measure, r) for r in (x, y))
    norms = _self_without_each(measure, x) * _self_without_each(measure, y)
    return _hsic_without_each(measure, a, b) / norms.clamp(min=0).sqrt()


def _self_without_each(measure: CKA, x: Representation) -> Float[Tensor, " n"]:
    sums = _kernel_sums(measure, x)
    return x.derived((measure, "self HSIC without each"), lambda _: _hsic_without_each(measure, sums, sums))


class _KernelSums(NamedTuple):
    """A kernel's matrix K, without its diagonal for the debiased measure, and its sums for leaving samples out."""

    matrix: Float[Tensor, "n n"]
    rows: Float[Tensor, " n"]
    diagonal: Float[Tensor, " n"]


def _kernel_sums(measure: CKA, x: Representation) -> _KernelSums:
    return x.derived((measure, "kernel sums"), lambda layer: _sum_kernel(measure, measure.kernel_of(layer)))


def _sum_kernel(measure: CKA, kernel: Float[Tensor, "n n"]) -> _KernelSums:
    if measure.debiased:
        kernel = kernel - torch.diag(kernel.diagonal())
    return _KernelSums(kernel, kernel.sum(1), kernel.diagonal())


def _hsic_without_each(measure: CKA, k: _KernelSums, m: _KernelSums) -> Float[Tensor, " n"]:
    """Return tr(K H L H), or n(n − 3) HSIC₁, of the remaining n samples, for each sample left out.

    From tr(K L), 1ᵀK L 1 and 1ᵀK 1 · 1ᵀL 1 without row and column i, for each i.
    """
    n = len(k.rows) - 1
    product, diagonal = torch.linalg.vecdot(k.matrix, m.matrix), k.diagonal * m.diagonal
    trace = product.sum() - 2 * product + diagonal
    totals = (k.rows.sum() - 2 * k.rows + k.diagonal) * (m.rows.sum() - 2 * m.rows + m.diagonal)
    cross = k.rows @ m.rows - m.matrix @ k.rows - k.matrix @ m.rows + product
    cross = cross - (k.rows - k.diagonal) * (m.rows - m.diagonal)
    if measure.debiased:
        return trace + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross
    return trace - 2 / n * cross + totals / n**2


def _hsic(x: Representation, y: Representation) -> Float[Tensor, ""]:
    """Return tr(K L) = ‖YᵀX‖²_F, from the features or the Gram matrices, whichever are smaller."""
    if x.slim is not None and y.slim is not None:
        return (x.slim.T @ y.slim).square().sum()
    return torch.dot(x.gram.flatten(), y.gram.flatten())


def _hsic_unbiased(x: Representation, y: Representation) -> Float[Tensor, ""]:
    """Return n(n−3) HSIC₁ (Song et al. 2012, eq. 5) from Gram matrices with zeroed diagonals.

    With a, b the diagonals of the centred Grams K, L: K̃ = K − diag a has row sums −a, so every term of the
    estimator follows from tr(K L), a and b.
    """
    n, a, b = x.n, _squared_lengths(x), _squared_lengths(y)
    totals = a.sum() * b.sum() / ((n - 1) * (n - 2))
    return _hsic(x, y) - a @ b + totals - 2 / (n - 2) * (a @ b)


def _without_noise(x: Representation, self_hsic: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Subtract what a sketch adds to a layer's product with itself."""
    return squared_norm(self_hsic, _squared_lengths(x).sum(), x.width, x.sketch) if x.sketch else self_hsic


def _trace_and_norm(centred: Float[Tensor, "n n"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    return centred.trace(), centred.norm()


def _squared_lengths(x: Representation) -> Float[Tensor, " n"]:
    """Return each sample's squared length after centring."""
    return x.gram.diagonal() if x.slim is None else x.slim.square().sum(1)


def _u_centred(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return the U-centred matrix, whose inner products are n(n−3) HSIC₁ (Székely & Rizzo 2014)."""
    n = len(gram)
    hollow = gram - torch.diag(gram.diagonal())
    rows = hollow.sum(1) / (n - 2)
    centred = hollow - rows[:, None] - rows + hollow.sum() / ((n - 1) * (n - 2))
    return centred - torch.diag(centred.diagonal())


def _kernel_suffix(kernel: Kernel) -> str:
    name = getattr(kernel, "name", type(kernel).__name__)
    return f"_{name}" if name else ""
