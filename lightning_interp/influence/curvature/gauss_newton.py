"""Exact generalised Gauss–Newton matrix, for small models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_interp.influence.curvature.ekfac import Traces
from lightning_interp.influence.curvature.loss import pseudo_gradients
from lightning_interp.influence.gradients import Gradients, Rows
from lightning_interp.task import Task

MOST_PARAMETERS = 8192


@dataclass(frozen=True)
class GaussNewton:
    """The whole generalised Gauss–Newton matrix H = (1/n) Σ JᵀH_ℓJ over the covered parameters.

    For cross entropy it is the Fisher matrix, for a linear model the Hessian. Memory is 8 bytes per pair of
    parameters: at most 8,192 of them. The default damping of `InfluenceFunction` is too small for it: give weight
    decay + 2/τ, τ the sum of learning rates / (1 − momentum) over all steps of SGD.

    Reference: Martens, New Insights and Perspectives on the Natural Gradient Method, 2020.

    Args:
        samples: training samples, evenly spread, that it is computed from; all when None.
    """

    samples: int | None = None

    def check(self, parameters: int) -> None:
        """Raise an error if there are too many parameters.

        Raises:
            ValueError: there are more than 8,192.
        """
        if parameters > MOST_PARAMETERS:
            raise ValueError(f"GaussNewton: expected at most {MOST_PARAMETERS} covered parameters, got {parameters}")

    def fit(self, traces: Traces, task: Task) -> FittedGaussNewton:
        """Sum the matrix over all samples.

        Raises:
            ValueError: there are too many parameters.
        """
        matrix, n = torch.zeros(0, 0, dtype=torch.float64), 0
        shapes: dict[str, torch.Size] = {}
        for trace in traces("curvature"):
            n += len(trace.losses)
            for rows in pseudo_gradients(trace, task):
                shapes = {layer: row.shape for layer, row in rows.items()}
                flat = flatten(rows)
                self.check(flat.shape[1])
                matrix = flat.T @ flat + matrix if len(matrix) else flat.T @ flat
        return FittedGaussNewton(matrix / n, shapes, n)


@dataclass(frozen=True, eq=False)
class FittedGaussNewton:
    """The matrix, ready to be inverted.

    Args:
        matrix: `(p, p)`, float64.
        shapes: layer → shape of its gradient, in the order of the matrix's blocks.
        n: number of samples used.
    """

    matrix: Tensor
    shapes: dict[str, torch.Size]
    n: int

    @property
    def mean_eigenvalue(self) -> float:
        """Mean over all eigenvalues."""
        return float(self.matrix.diagonal().mean())

    def solve(self, gradients: Gradients, damping: float) -> Gradients:
        """Return (H + λI)⁻¹ v for gradients `(q, groups, o, i)` of each layer."""
        flat = torch.cat([gradients[layer].flatten(1) for layer in self.shapes], dim=1).cpu().double()
        damped = self.matrix + damping * torch.eye(len(self.matrix), dtype=torch.float64)
        solved = torch.linalg.solve(damped, flat.T).T
        parts = solved.split([shape.numel() for shape in self.shapes.values()], dim=1)
        return {
            layer: part.reshape(-1, *shape).to(gradients[layer].dtype).to(gradients[layer].device)
            for (layer, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


def flatten(rows: dict[str, Rows]) -> Tensor:
    """Return all layers' per-sample gradients side by side, `(n, p)`, float64."""
    return torch.cat([row.gradients().flatten(1) for row in rows.values()], dim=1).cpu().double()
