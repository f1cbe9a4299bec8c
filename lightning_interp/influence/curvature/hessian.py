"""The exact Hessian of the training loss: for convex models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_interp.data.batch import count_samples, slice_samples
from lightning_interp.data.samples import Samples
from lightning_interp.influence.curvature.gauss_newton import FittedMatrix
from lightning_interp.influence.curvature.vectors import Space, pulled, twice_differentiable
from lightning_interp.influence.gradients.factored import elements_in_memory
from lightning_interp.influence.gradients.per_sample import PerSampleGradients
from lightning_interp.influence.gradients.reader import ELEMENTS_AT_ONCE, Reader

MOST_PARAMETERS = 4096
CONVEX = 1e-6


@dataclass(frozen=True)
class Hessian:
    """The Hessian of the mean training loss, H = (1/n) Σ ∂²ℓ_i/∂θ², of up to 4,096 parameters.

    For a model that is linear in its parameters it equals `GaussNewton()`. Of a deep network it has negative
    eigenvalues, and its damped inverse turns the scores around in their directions: that is refused.

    Reference: Koh & Liang, Understanding Black-box Predictions via Influence Functions, 2017.
    """

    def check(self, parameters: int) -> None:
        """Raise an error if there are too many parameters.

        Raises:
            ValueError: there are more than 4,096.
        """
        if parameters > MOST_PARAMETERS:
            raise ValueError(
                f"Hessian: expected at most {MOST_PARAMETERS} covered parameters, got {parameters};"
                " pass GaussNewton(columns=1024)"
            )

    def fit(self, reader: Reader, samples: Samples) -> FittedMatrix:
        """Sum the matrix over all samples.

        Raises:
            ValueError: there are too many parameters, or the loss is not convex at them: the smallest eigenvalue is
                below −1e-6 × the largest.
        """
        space = Space(reader.coverage)
        self.check(space.size)
        matrix = torch.zeros(space.size, space.size, dtype=torch.float64)
        for batch in reader.batches(samples, "curvature"):
            matrix += _summed(reader, space, batch).cpu().double()
        matrix = (matrix + matrix.mT) / (2 * len(samples))
        values = torch.linalg.eigvalsh(matrix)
        least, most = float(values[0]), float(values[-1])
        if not least >= -CONVEX * most:
            raise ValueError(
                f"Hessian: expected a loss that is convex at its parameters, got eigenvalues from {least:.2g} to"
                f" {most:.2g}; pass GaussNewton() or GaussNewton(columns=1024), which have none below 0"
            )
        return FittedMatrix(matrix, reader.coverage.shapes, len(samples))


def _summed(reader: Reader, space: Space, batch: Any) -> Tensor:
    """Return Σ ∂²ℓ/∂θ² over a batch, some rows at a time."""
    watch, parameters = reader.coverage.watched_model, space.parameters
    held = elements_in_memory(PerSampleGradients(watch, slice_samples(batch, 0, 1)).loss_gradients())
    with twice_differentiable():
        loss = watch.task.total(watch.model, batch)
    slopes = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    one_each = torch.eye(space.size, dtype=loss.dtype, device=loss.device)
    rows = one_each.split(max(1, ELEMENTS_AT_ONCE // (space.size + held * count_samples(batch))))
    return torch.cat([space.gathered(pulled(slopes, parameters, space.spread(some))) for some in rows])
