"""The exact Hessian of the training loss: for convex models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_interp.data.batch import count_samples, slice_samples
from lightning_interp.data.samples import Samples
from lightning_interp.influence.curvature.gauss_newton import FittedMatrix
from lightning_interp.influence.curvature.vectors import Space, twice_differentiable, vector_jacobian_products
from lightning_interp.influence.gradients.factored import elements_in_memory
from lightning_interp.influence.gradients.per_sample import PerSampleGradients
from lightning_interp.influence.gradients.reader import ELEMENTS_AT_ONCE, Reader

MOST_PARAMETERS_FOR_HESSIAN = 4096  # 128 MB in float64, and all of its eigenvalues are computed
CONVEXITY_TOLERANCE = 1e-6  # of the largest eigenvalue: what single precision rounds a zero eigenvalue to


@dataclass(frozen=True)
class Hessian:
    """The Hessian of the mean training loss, H = (1/n) Σ ∂²ℓ_i/∂θ², of up to 4,096 parameters.

    For a model that is linear in its parameters it equals `GaussNewton()`. Of a deep network it has negative
    eigenvalues, and its damped inverse reverses the sign of the scores in their directions: an error is raised.

    Reference: Koh & Liang, Understanding Black-box Predictions via Influence Functions, 2017.
    """

    def check(self, parameters: int) -> None:
        """Raise an error if there are too many parameters.

        Raises:
            ValueError: there are more than 4,096.
        """
        if parameters > MOST_PARAMETERS_FOR_HESSIAN:
            raise ValueError(
                f"Hessian: expected at most {MOST_PARAMETERS_FOR_HESSIAN} covered parameters, got {parameters};"
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
            matrix += _hessian_of_batch(reader, space, batch).cpu().double()
        matrix = (matrix + matrix.mT) / (2 * len(samples))
        eigenvalues = torch.linalg.eigvalsh(matrix)
        smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
        if not smallest >= -CONVEXITY_TOLERANCE * largest:
            raise ValueError(
                f"Hessian: expected a loss that is convex at its parameters, got eigenvalues from {smallest:.2g} to"
                f" {largest:.2g}; pass GaussNewton() or GaussNewton(columns=1024), which have none below 0"
            )
        return FittedMatrix(matrix, reader.coverage.shapes, len(samples))


def _hessian_of_batch(reader: Reader, space: Space, batch: Any) -> Tensor:
    """Return Σ ∂²ℓ/∂θ² over a batch, some rows at a time."""
    watch, parameters = reader.coverage.watched_model, space.parameters
    elements_per_sample = elements_in_memory(PerSampleGradients(watch, slice_samples(batch, 0, 1)).loss_gradients())
    with twice_differentiable():
        loss = watch.task.total(watch.model, batch)
    slopes = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    identity = torch.eye(space.size, dtype=loss.dtype, device=loss.device)
    rows = identity.split(max(1, ELEMENTS_AT_ONCE // (space.size + elements_per_sample * count_samples(batch))))
    products = (vector_jacobian_products(slopes, parameters, space.spread(unit_vectors)) for unit_vectors in rows)
    return torch.cat([space.gathered(product) for product in products])
