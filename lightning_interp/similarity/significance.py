"""What a similarity would be by chance: the value for the same features with their samples shuffled."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.similarity.cca import CCA, SVCCA
from lightning_interp.similarity.cka import CKA
from lightning_interp.similarity.matrix import AnyMeasure, similarity
from lightning_interp.similarity.representation import Representation, same_samples

FEWEST = 8


def is_exact(measure: AnyMeasure) -> bool:
    """Say whether a measure's value by chance is known in closed form."""
    return isinstance(measure, CKA) or (isinstance(measure, (CCA, SVCCA)) and measure.summary == "mean_squared")


def chance(measure: AnyMeasure, x: Representation, y: Representation, draws: int = 3) -> float:
    """Return what a measure would give by chance: its mean where one layer's samples are shuffled.

    Exact for CKA and for R²_CCA, plain or after SVCCA's reduction; for the rest the mean of a few permutations.
    """
    if x.n != y.n:
        return float("nan")
    if isinstance(measure, CKA):
        return float(cka_null(measure, x, y))
    if isinstance(measure, (CCA, SVCCA)) and measure.summary == "mean_squared":
        kx, ky = measure.kept(x), measure.kept(y)
        return r_squared_null(kx, ky, x.n) if min(kx, ky) > 0 and max(kx, ky) < x.n - 1 else float("nan")
    return float(permutation_null(measure, x, y, draws).mean())


def standard_error(measure: AnyMeasure, x: Representation, y: Representation) -> float:
    """Return the jackknife standard error over samples, for kinds of CKA.

    NaN for the rest, for sketches, whose own error is another, and for fewer than 8 samples.
    """
    known = isinstance(measure, CKA) and x.n == y.n >= FEWEST and not (x.sketch or y.sketch)
    return float(cka_standard_error(measure, x, y)) if isinstance(measure, CKA) and known else float("nan")


def cka_null(measure: CKA, x: Representation, y: Representation) -> Float[Tensor, ""]:
    """Return the exact mean of CKA over all permutations of y's samples.

    tr K tr L / ((n − 1) ‖K‖_F ‖L‖_F) for centred Gram matrices; 0 for the debiased measure, whose numerator is 0 in the
    mean.

    Reference: Kazi-Aoual et al., Refined Approximations to Permutation Tests for Multivariate Inference, 1995.
    """
    same_samples(x, y)
    if measure.debiased:
        return torch.zeros((), dtype=torch.float64)
    (total_x, size_x), (total_y, size_y) = (measure.spread(r) for r in (x, y))
    return total_x * total_y / ((x.n - 1) * size_x * size_y)


def r_squared_null(kx: int, ky: int, n: int) -> float:
    """Return the mean of R²_CCA (the mean ρ²) of independent features of ranks kx and ky: max(kx, ky) / (n − 1).

    For SVCCA the ranks are the numbers of directions that it keeps.
    """
    return max(kx, ky) / (n - 1)


def permutation_null(
    measure: AnyMeasure, x: Representation, y: Representation, draws: int = 20, seed: int = 0
) -> Float[Tensor, " draws"]:
    """Return a measure's values for random permutations of y's samples, by a generator of its own.

    Args:
        measure: any.
        x: a prepared layer.
        y: another.
        draws: how many permutations.
        seed: of the permutations.
    """
    same_samples(x, y)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(y.n, generator=generator) for _ in range(draws)]
    return torch.stack([similarity(measure, x, y.shuffled(order)) for order in orders])


def cka_standard_error(measure: CKA, x: Representation, y: Representation) -> Float[Tensor, ""]:
    """Return the jackknife standard error of CKA: how much it varies with the choice of samples.

    √((n − 1)/n Σ_i (θ_i − θ̄)²), θ_i the value without sample i, all n of them from two n × n Gram matrices; a kernel's
    width stays that of all samples.

    Reference: Efron & Stein, The Jackknife Estimate of Variance, 1981.
    """
    values = cka_without_each(measure, x, y)
    return ((x.n - 1) / x.n * (values - values.mean()).square().sum()).sqrt()


def cka_without_each(measure: CKA, x: Representation, y: Representation) -> Float[Tensor, " n"]:
    """Return CKA with each of the n samples left out in turn."""
    same_samples(x, y)
    a, b = (_summed(measure, r) for r in (x, y))
    norms = _own_without_each(measure, x) * _own_without_each(measure, y)
    return _hsic_without_each(measure, a, b) / norms.clamp(min=0).sqrt()


def _own_without_each(measure: CKA, x: Representation) -> Float[Tensor, " n"]:
    kept = _summed(measure, x)
    return x.derived((measure, "own without each"), lambda _: _hsic_without_each(measure, kept, kept))


class _Summed(NamedTuple):
    """A kernel's matrix K, for the debiased measure without its diagonal, and what is needed of it again and again."""

    matrix: Float[Tensor, "n n"]
    rows: Float[Tensor, " n"]
    diagonal: Float[Tensor, " n"]


def _summed(measure: CKA, x: Representation) -> _Summed:
    return x.derived((measure, "summed"), lambda layer: _sums(measure, measure.kernel_of(layer)))


def _sums(measure: CKA, kernel: Float[Tensor, "n n"]) -> _Summed:
    if measure.debiased:
        kernel = kernel - torch.diag(kernel.diagonal())
    return _Summed(kernel, kernel.sum(1), kernel.diagonal())


def _hsic_without_each(measure: CKA, k: _Summed, m: _Summed) -> Float[Tensor, " n"]:
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
