"""Kronecker-factored curvature by the factors' own means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.checks import check_counts
from lightning_interp.data.samples import Samples
from lightning_interp.influence.curvature.curvature import Fitted, share_of_mean_eigenvalue, spread_out
from lightning_interp.influence.curvature.ekfac import (
    WIDEST_FACTOR,
    Basis,
    FittedEKFAC,
    column_passes,
    eigenvectors_cost,
)
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.gradients.blocks import ParameterBlock
from lightning_interp.influence.gradients.factored import FactoredGradients, Lookup
from lightning_interp.influence.gradients.reader import Reader


@dataclass(frozen=True)
class KFAC:
    """Generalised Gauss–Newton matrix, one block per layer, each the product of two means: H_layer ≈ B ⊗ A.

    A = (1/n) Σ a aᵀ of the layer's inputs (and a one for its bias), B = (1/n) Σ g gᵀ of the output gradients of the
    matrix's columns. With several positions, A sums over them and B is their mean. What it leaves out: curvature
    between layers, and that large inputs may come with large gradients, which `EKFAC` corrects.

    Reference: Martens & Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, 2015; for
    convolutions Grosse & Martens, A Kronecker-factored Approximate Fisher Matrix for Convolution Layers, 2016.

    Args:
        columns: how many columns of the matrix B is estimated from: an unbiased sample, which contains the large ones
            (see `PrioritySample`); every column of every sample when None.
        samples: training samples, evenly spread, that it is estimated from; all when None.
        seed: of the sample.
    """

    columns: int | None = 2048
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts("KFAC", columns=self.columns, samples=self.samples)

    def check(self, parameters: int) -> None:
        """Accept any number of parameters: memory grows with the layers' widths, not with their product squared."""

    def default_damping(self, fitted: Fitted) -> Damping:
        """Return 0.1 × the mean eigenvalue: what Kronecker factors leave out takes more damping than training had."""
        return share_of_mean_eigenvalue(fitted)

    def decomposition_cost(self, blocks: Iterable[ParameterBlock]) -> float:
        """Return the sum of the cubes of all sides that get eigenvectors."""
        return eigenvectors_cost(blocks)

    def fit(self, reader: Reader, samples: Samples) -> FittedEKFAC:
        """Estimate A in a pass over the samples, B in one over the columns."""
        subset = spread_out(samples, self.samples)
        column_gradients, n, notes = column_passes(reader, subset, self.columns, self.seed)
        traces = reader.per_sample_gradients(subset, "curvature, inputs")
        inputs = _sum_of_factors((trace.loss_gradients() for trace in traces), _input_factor)
        outputs = _sum_of_factors(column_gradients("curvature, output gradients"), _output_factor)
        sides = {b: (_decompose(outputs[b] / n), _decompose(inputs[b] / len(subset))) for b in inputs}
        bases = {name: Basis(b.vectors, a.vectors) for name, (b, a) in sides.items()}
        values = {name: b.values[:, :, None] * a.values[:, None, :] for name, (b, a) in sides.items()}
        return FittedEKFAC(bases, values, n, notes)


class _DecomposedFactor(NamedTuple):
    """One factor's eigenvalues, `(groups, d)`, and eigenvectors, `(groups, d, d)`; None where it is diagonal."""

    values: Tensor
    vectors: Tensor | None


def _sum_of_factors(
    gradients_of_batches: Iterable[dict[str, FactoredGradients]], factor: Callable[[FactoredGradients], Tensor]
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for rows in gradients_of_batches:
        for block, row in rows.items():
            block_factor = factor(row)
            sums[block] = sums[block] + block_factor if block in sums else block_factor
    return sums


def _input_factor(rows: FactoredGradients) -> Tensor:
    """Return Σ a aᵀ over samples and positions."""
    inputs = rows.inputs
    if isinstance(inputs, Lookup):
        # The second moment of one-hot vectors is diagonal: how often each row was taken.
        return torch.bincount(inputs.index.flatten(), minlength=inputs.count)[None].to(rows.outputs)
    return _factor_of_rows(inputs)


def _output_factor(rows: FactoredGradients) -> Tensor:
    """Return Σ g gᵀ over samples, the mean over positions."""
    return _factor_of_rows(rows.outputs) / rows.positions


def _factor_of_rows(factors: Float[Tensor, "n groups t d"]) -> Tensor:
    """Return `(groups, d, d)`; the diagonal `(groups, d)` where that is too wide or has one dimension."""
    if not 1 < factors.shape[3] <= WIDEST_FACTOR:
        return factors.square().sum((0, 2))
    rows = factors.transpose(0, 1).flatten(1, 2)
    return rows.mT @ rows


def _decompose(factor: Tensor) -> _DecomposedFactor:
    if factor.ndim == 2:
        return _DecomposedFactor(factor, None)
    values, vectors = torch.linalg.eigh(factor.cpu().double())
    # Rounding may leave an eigenvalue below zero.
    return _DecomposedFactor(values.clamp(min=0).to(factor), vectors.to(factor))
