"""The damped Gauss–Newton matrix as products with vectors: never written down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.data.batch import count_samples
from lightning_interp.data.samples import Samples
from lightning_interp.data.task import Task, loss_per_sample
from lightning_interp.influence.curvature.curvature import Shift, sum_of
from lightning_interp.influence.curvature.vectors import Space, twice_differentiable, vector_jacobian_products
from lightning_interp.influence.gradients.distributed import share_of_rank
from lightning_interp.influence.gradients.factored import elements_in_memory
from lightning_interp.influence.gradients.ggn_columns import hessian_root
from lightning_interp.influence.gradients.per_sample import PerSampleGradients
from lightning_interp.influence.gradients.reader import ELEMENTS_AT_ONCE, Reader

SAMPLES_PER_PRODUCT = 256  # in a forward, where they fit in memory: small batches cost overhead in every iteration


@dataclass(frozen=True, eq=False)
class Operator:
    """(H + Λ) v = (1/n) Σ Jᵀ H_ℓ J v + Λ v, for many vectors v at once.

    J v is a backward through a backward: Jᵀu is linear in u, and its derivative by u times v is J v. That is cheaper
    here than forward differentiation, and every layer that can be differentiated twice has it. No derivative of a loss
    by each class is needed, so the number of outputs does not matter.

    Reference: Pearlmutter, Fast Exact Multiplication by the Hessian, 1994; Schraudolph, Fast Curvature Matrix-Vector
    Products for Second-Order Gradient Descent, 2002.

    Args:
        reader: how samples go through the network.
        samples: that the mean goes over.
        elements_per_sample: that are kept in memory per vector, about.
        shift: Λ per block; none when empty.
    """

    reader: Reader
    samples: Samples
    elements_per_sample: int
    shift: Shift = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, reader: Reader, samples: Samples) -> Operator:
        """Measure on one sample how many samples and vectors fit in memory."""
        first = next(reader.batches(samples.at([0]), "curvature, size"))
        elements_per_sample = elements_in_memory(
            PerSampleGradients(reader.coverage.watched_model, first).loss_gradients()
        )
        batch_size = max(samples.batch_size, SAMPLES_PER_PRODUCT)
        max_batch_size = max(1, min(batch_size, ELEMENTS_AT_ONCE // max(1, elements_per_sample)))
        samples = dataclasses.replace(samples, batch_size=batch_size)
        return cls(dataclasses.replace(reader, max_batch_size=max_batch_size), samples, elements_per_sample)

    @property
    def space(self) -> Space:
        """Where a vector's elements belong."""
        return Space(self.reader.coverage)

    def damped(self, shift: Shift) -> Operator:
        """Return the operator with Λ added."""
        return dataclasses.replace(self, shift=shift)

    def on(self, indices: Sequence[int]) -> Operator:
        """Return the operator of some of the samples, by their positions."""
        # Without worker processes, whose start would cost more than reading one mini-batch.
        return dataclasses.replace(self, samples=dataclasses.replace(self.samples.at(indices), workers=0))

    def __call__(self, vectors: Float[Tensor, "q p"]) -> Float[Tensor, "q p"]:
        """Return (H + Λ) v of each vector."""
        by_parameter = self.space.spread(vectors)
        sums = [torch.zeros_like(vector) for vector in by_parameter]
        own_samples, _ = share_of_rank(self.samples, self.reader.ranks)
        for batch in self.reader.batches(own_samples, "curvature, products"):
            self._add(batch, by_parameter, sums)
        mean = self._sum_over_ranks(self.space.gathered(sums)).to(vectors) / len(self.samples)
        return mean.addcmul_(vectors, self.space.diagonal(self.shift, vectors)) if self.shift else mean

    def _sum_over_ranks(self, own: Tensor) -> Tensor:
        ranks = self.reader.ranks
        return own if ranks.count == 1 else sum_of(ranks.gather(own.cpu()))

    def _add(self, batch: Any, vectors: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        """Add Σ Jᵀ H_ℓ J v over a batch to the sums, some vectors at a time."""
        parameters, task = self.space.parameters, self.reader.coverage.task
        with twice_differentiable():
            outputs = task.outputs(self.reader.coverage.model, task.inputs(batch))
        times_hessian = loss_hessian(outputs, task.targets(batch), task)
        # u of Jᵀu: its value does not matter, as Jᵀu is linear in it.
        u = torch.zeros_like(outputs, requires_grad=True)
        transposed = torch.autograd.grad(
            outputs, parameters, u, create_graph=True, allow_unused=True, materialize_grads=True
        )
        step = max(1, ELEMENTS_AT_ONCE // (self.space.size + self.elements_per_sample * count_samples(batch)))
        for start in range(0, len(vectors[0]), step):
            chunk = slice(start, start + step)
            (along_outputs,) = vector_jacobian_products(transposed, [u], [vector[chunk] for vector in vectors])
            products = vector_jacobian_products([outputs], parameters, [times_hessian(along_outputs)])
            for total, product in zip(sums, products, strict=True):
                total[chunk] += product


def loss_hessian(outputs: Tensor, targets: Tensor, task: Task) -> Callable[[Tensor], Tensor]:
    """Return a function: v `(q, *shape of outputs)` → H_ℓ v, H_ℓ each sample's ∂²ℓ/∂f².

    Differentiated where the loss is one of this package's own, which are convex in the outputs; of any other loss the
    part of its Hessian without negative eigenvalues.
    """
    leaf = outputs.detach().requires_grad_()
    if task.loss is not loss_per_sample:
        root = hessian_root(leaf, targets, task)
        rows = torch.arange(len(leaf), device=leaf.device)
        columns = [root.column(rows, torch.full_like(rows, k)).flatten(1) for k in range(root.norms.shape[1])]
        stacked = torch.stack(columns).to(leaf)
        return lambda v: torch.einsum("knd,kne,qne->qnd", stacked, stacked, v.flatten(2)).reshape(v.shape)
    (slope,) = torch.autograd.grad(task.per_sample(leaf, targets).sum(), leaf, create_graph=True)
    return lambda v: vector_jacobian_products([slope], [leaf], [v])[0].detach()
