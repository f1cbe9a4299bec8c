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
from lightning_interp.influence.curvature.ekfac import WIDEST, Basis, FittedEKFAC, passes
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
        columns: how many columns of the matrix B is estimated from: an unbiased sample, the large ones surely in it
            (see `lightning_interp.influence.columns.PrioritySample`); every column of every sample when None.
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

    def fit(self, reader: Reader, samples: Samples) -> FittedEKFAC:
        """Estimate A in a pass over the samples, B in one over the columns."""
        some = samples if self.samples is None else samples.spread(self.samples)
        column_rows, n, notes = passes(reader, some, self.columns, self.seed)
        traces = reader.per_sample_gradients(some, "curvature, inputs")
        inputs = _summed((trace.loss_gradients() for trace in traces), _of_inputs)
        outputs = _summed(column_rows("curvature, output gradients"), _of_outputs)
        sides = {b: (_side(outputs[b] / n), _side(inputs[b] / len(some))) for b in inputs}
        bases = {name: Basis(b.vectors, a.vectors) for name, (b, a) in sides.items()}
        values = {name: b.values[:, :, None] * a.values[:, None, :] for name, (b, a) in sides.items()}
        return FittedEKFAC(bases, values, n, notes)


class _Side(NamedTuple):
    """One factor's eigenvalues, `(groups, d)`, and eigenvectors, `(groups, d, d)`; None where it is diagonal."""

    values: Tensor
    vectors: Tensor | None


def _summed(
    passed: Iterable[dict[str, FactoredGradients]], factor: Callable[[FactoredGradients], Tensor]
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for rows in passed:
        for block, row in rows.items():
            found = factor(row)
            sums[block] = sums[block] + found if block in sums else found
    return sums


def _of_inputs(rows: FactoredGradients) -> Tensor:
    """Return Σ a aᵀ over samples and positions."""
    held = rows.inputs
    if isinstance(held, Lookup):
        return torch.bincount(held.index.flatten(), minlength=held.count)[None].to(rows.outputs)
    return _products(held)


def _of_outputs(rows: FactoredGradients) -> Tensor:
    """Return Σ g gᵀ over samples, the mean over positions."""
    return _products(rows.outputs) / rows.positions


def _products(side: Float[Tensor, "n groups t d"]) -> Tensor:
    """Return `(groups, d, d)`; the diagonal `(groups, d)` where that is too wide or has one dimension."""
    if not 1 < side.shape[3] <= WIDEST:
        return side.square().sum((0, 2))
    flat = side.transpose(0, 1).flatten(1, 2)
    return flat.mT @ flat


def _side(factor: Tensor) -> _Side:
    if factor.ndim == 2:
        return _Side(factor, None)
    values, vectors = torch.linalg.eigh(factor.cpu().double())
    return _Side(values.clamp(min=0).to(factor), vectors.to(factor))
