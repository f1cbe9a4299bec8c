"""Eigenvalue-corrected Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_interp.influence.curvature.loss import pseudo_gradients
from lightning_interp.influence.gradients import Gradients, Rows, Trace
from lightning_interp.task import Task

Traces = Callable[[str], Iterator[Trace]]


@dataclass(frozen=True)
class EKFAC:
    """Generalised Gauss–Newton matrix, one block per layer, diagonal in a Kronecker-factored eigenbasis.

    H_layer ≈ (U_B ⊗ U_A) Λ (U_B ⊗ U_A)ᵀ: U_A and U_B are the eigenvectors of the mean outer products of the
    layer's inputs and output gradients, Λ the mean squared gradient along each of their products. All outputs are
    enumerated (see `hessian_root`). What it leaves out: curvature between layers, and within one off its basis.

    Reference: George et al., Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis, 2018;
    Grosse et al., Studying Large Language Model Generalization with Influence Functions, 2023.

    Args:
        samples: training samples, evenly spread, that it is estimated from; all when None.
    """

    samples: int | None = 4096

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"EKFAC(samples=...): expected at least 1 or None, got {self.samples}")

    def check(self, parameters: int) -> None:
        """Accept any number of parameters: memory grows with the layers' widths, not with their product squared."""

    def fit(self, traces: Traces, task: Task) -> FittedEKFAC:
        """Estimate the blocks in two passes: factors first, then the eigenvalues in their basis.

        Args:
            traces: a caption → traces of all samples' batches, from the beginning at each call.
            task: whose loss is curved.
        """
        bases = _bases(traces("curvature, factors"), task)
        eigenvalues: dict[str, Tensor] = {}
        n = 0
        for trace in traces("curvature, eigenvalues"):
            n += len(trace.losses)
            for rows in pseudo_gradients(trace, task):
                for layer, row in rows.items():
                    squares = _squares(row, *bases[layer])
                    eigenvalues[layer] = eigenvalues[layer] + squares if layer in eigenvalues else squares
        return FittedEKFAC(bases, {layer: sums / n for layer, sums in eigenvalues.items()}, n)


@dataclass(frozen=True, eq=False)
class FittedEKFAC:
    """Curvature estimated from data, ready to be inverted.

    Args:
        bases: layer → eigenvectors of inputs `(groups, i, i)` and of output gradients `(groups, o, o)`.
        eigenvalues: layer → `(groups, o, i)`.
        n: number of samples used.
    """

    bases: dict[str, tuple[Tensor, Tensor]]
    eigenvalues: dict[str, Tensor]
    n: int

    @property
    def mean_eigenvalue(self) -> float:
        """Mean over all eigenvalues of all layers."""
        total = sum(float(values.cpu().double().sum()) for values in self.eigenvalues.values())
        return total / sum(values.numel() for values in self.eigenvalues.values())

    def solve(self, gradients: Gradients, damping: float) -> Gradients:
        """Return (H + λI)⁻¹ v for gradients `(q, groups, o, i)` of each layer."""
        return {layer: self._solve(layer, grads, damping) for layer, grads in gradients.items()}

    def _solve(self, layer: str, grads: Tensor, damping: float) -> Tensor:
        inputs, outputs = self.bases[layer]
        rotated = outputs.mT @ grads @ inputs
        return outputs @ (rotated / (self.eigenvalues[layer] + damping)) @ inputs.mT


def _bases(traces: Iterator[Trace], task: Task) -> dict[str, tuple[Tensor, Tensor]]:
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for trace in traces:
        for place, rows in enumerate(pseudo_gradients(trace, task)):
            for layer, row in rows.items():
                if place == 0:
                    _accumulate(inputs, layer, row.inputs)
                _accumulate(outputs, layer, row.outputs)
    return {layer: (_eigenvectors(inputs[layer]), _eigenvectors(outputs[layer])) for layer in inputs}


def _accumulate(sums: dict[str, Tensor], layer: str, rows: Tensor) -> None:
    flat = rows.transpose(1, 2).flatten(0, 1).transpose(0, 1)
    product = flat.mT @ flat
    sums[layer] = sums[layer] + product if layer in sums else product


def _eigenvectors(factor: Tensor) -> Tensor:
    return torch.linalg.eigh(factor.cpu().double())[1].to(factor.dtype).to(factor.device)


def _squares(rows: Rows, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return Σ_n (U_Bᵀ G_n U_A)² over samples, G_n a sample's gradient."""
    rotated = Rows(rows.inputs @ inputs, rows.outputs @ outputs)
    if rows.inputs.shape[2] == 1:
        a, g = rotated.inputs[:, :, 0].square(), rotated.outputs[:, :, 0].square()
        return torch.einsum("ngo,ngi->goi", g, a)
    return torch.stack([block.gradients().square().sum(0) for _, block in rotated.blocks()]).sum(0)
