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
from lightning_interp.influence.curvature.vectors import Space, pulled, twice_differentiable
from lightning_interp.influence.gradients.distributed import share_of_rank
from lightning_interp.influence.gradients.factored import elements_in_memory
from lightning_interp.influence.gradients.ggn_columns import hessian_root
from lightning_interp.influence.gradients.per_sample import PerSampleGradients
from lightning_interp.influence.gradients.reader import ELEMENTS_AT_ONCE, Reader

SAMPLES_AT_ONCE = 256


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
        held: elements that a sample keeps in memory per vector, about.
        shift: Λ per block; none when empty.
    """

    reader: Reader
    samples: Samples
    held: int
    shift: Shift = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, reader: Reader, samples: Samples) -> Operator:
        """Measure on one sample how many samples and vectors fit in memory."""
        one = next(reader.batches(samples.at([0]), "curvature, size"))
        held = elements_in_memory(PerSampleGradients(reader.coverage.watched_model, one).loss_gradients())
        batch_size = max(samples.batch_size, SAMPLES_AT_ONCE)
        at_once = max(1, min(batch_size, ELEMENTS_AT_ONCE // max(1, held)))
        samples = dataclasses.replace(samples, batch_size=batch_size)
        return cls(dataclasses.replace(reader, max_batch_size=at_once), samples, held)

    @property
    def space(self) -> Space:
        """Where a vector's elements belong."""
        return Space(self.reader.coverage)

    def damped(self, shift: Shift) -> Operator:
        """Return the same with Λ added."""
        return dataclasses.replace(self, shift=shift)

    def on(self, places: Sequence[int]) -> Operator:
        """Return the same of some of the samples."""
        return dataclasses.replace(self, samples=dataclasses.replace(self.samples.at(places), workers=0))

    def __call__(self, vectors: Float[Tensor, "q p"]) -> Float[Tensor, "q p"]:
        """Return (H + Λ) v of each vector."""
        spread = self.space.spread(vectors)
        sums = [torch.zeros_like(part) for part in spread]
        mine, _ = share_of_rank(self.samples, self.reader.ranks)
        for batch in self.reader.batches(mine, "curvature, products"):
            self._add(batch, spread, sums)
        mean = self._of_all_ranks(self.space.gathered(sums)).to(vectors) / len(self.samples)
        return mean.addcmul_(vectors, self.space.diagonal(self.shift, vectors)) if self.shift else mean

    def _of_all_ranks(self, part: Tensor) -> Tensor:
        ranks = self.reader.ranks
        return part if ranks.count == 1 else sum_of(ranks.gather(part.cpu()))

    def _add(self, batch: Any, vectors: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        """Add Σ Jᵀ H_ℓ J v over a batch to the sums, some vectors at a time."""
        parameters, task = self.space.parameters, self.reader.coverage.task
        with twice_differentiable():
            outputs = task.outputs(self.reader.coverage.model, task.inputs(batch))
        curved = loss_hessian(outputs, task.targets(batch), task)
        probe = torch.zeros_like(outputs, requires_grad=True)
        back = torch.autograd.grad(
            outputs, parameters, probe, create_graph=True, allow_unused=True, materialize_grads=True
        )
        step = max(1, ELEMENTS_AT_ONCE // (self.space.size + self.held * count_samples(batch)))
        for start in range(0, len(vectors[0]), step):
            some = slice(start, start + step)
            (moved,) = pulled(back, [probe], [part[some] for part in vectors])
            for held, more in zip(sums, pulled([outputs], parameters, [curved(moved)]), strict=True):
                held[some] += more


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
        held = torch.stack(columns).to(leaf)
        return lambda v: torch.einsum("knd,kne,qne->qnd", held, held, v.flatten(2)).reshape(v.shape)
    (slope,) = torch.autograd.grad(task.per_sample(leaf, targets).sum(), leaf, create_graph=True)
    return lambda v: pulled([slope], [leaf], [v])[0].detach()
