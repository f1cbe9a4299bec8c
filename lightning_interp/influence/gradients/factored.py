"""Per-sample gradients in factored form: what a weight was multiplied with, and the gradient of what came out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

LARGEST_BLOCK = 2**21


@dataclass(frozen=True, eq=False)
class Lookup:
    """Inputs that are one-hot: which row of a table each position took. Within a sample no row appears twice.

    Args:
        index: `(n, t)`.
        count: rows of the table.
    """

    index: Int[Tensor, "n t"]
    count: int

    def dense(self) -> Float[Tensor, "n 1 t i"]:
        """Return the one-hot vectors themselves."""
        return F.one_hot(self.index, self.count)[:, None].float()

    def summed(self, values: Float[Tensor, "n t d"]) -> Float[Tensor, "1 d i"]:
        """Return the sum of all samples' values that belong to each row of the table, without a table for each."""
        d = values.shape[2]
        found = values.new_zeros(self.count, d).index_add_(0, self.index.flatten(), values.reshape(-1, d))
        return found.T[None]


@dataclass(frozen=True, eq=False)
class FactoredGradients:
    """One block's gradients, each a sum of outer products: G_n = Σ_t outputs[n, :, t] inputs[n, :, t]ᵀ.

    t runs over positions and calls. A bias is a last input column of ones. Parameters that are no matrix (the scales of
    a normalisation) have the gradient itself as their outputs, and ones as inputs.

    Args:
        inputs: `(n, groups, t, i)`, or a `Lookup` (one group).
        outputs: `(n, groups, t, o)`.
    """

    inputs: Float[Tensor, "n groups t i"] | Lookup
    outputs: Float[Tensor, "n groups t o"]

    def __len__(self) -> int:
        return len(self.outputs)

    @property
    def positions(self) -> int:
        """Number of outer products that a gradient is the sum of."""
        return self.outputs.shape[2]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one gradient, `(groups, o, i)`."""
        width = self.inputs.count if isinstance(self.inputs, Lookup) else self.inputs.shape[3]
        return self.outputs.shape[1], self.outputs.shape[3], width

    @property
    def size(self) -> int:
        """Number of elements of one gradient."""
        groups, o, i = self.shape
        return groups * o * i

    @property
    def stored_elements(self) -> int:
        """Number of elements that these rows keep in memory."""
        inputs = self.inputs.index if isinstance(self.inputs, Lookup) else self.inputs
        return inputs.numel() + self.outputs.numel()

    def gradients(self) -> Float[Tensor, "n groups o i"]:
        """Return each sample's gradient."""
        if isinstance(self.inputs, Lookup):
            n, _, t, o = self.outputs.shape
            found = self.outputs.new_zeros(n, 1, o, self.inputs.count)
            where = self.inputs.index[:, None, None, :].expand(n, 1, o, t)
            return found.scatter_add_(3, where, self.outputs.transpose(2, 3))
        if self.positions == 1:  # matrices with one column are multiplied slowly on a CPU
            return self.outputs.transpose(2, 3) * self.inputs
        return self.outputs.transpose(2, 3) @ self.inputs

    def chunks(self) -> Iterator[tuple[slice, FactoredGradients]]:
        """Yield the samples in blocks whose gradients fit in 8 MB (float32)."""
        n, step = len(self), max(1, LARGEST_BLOCK // self.size)
        for start in range(0, n, step):
            part = slice(start, min(n, start + step))
            yield part, self.at(part)

    def at(self, part: slice | Tensor) -> FactoredGradients:
        """Return the rows of some samples."""
        inputs = self.inputs
        return FactoredGradients(
            Lookup(inputs.index[part], inputs.count) if isinstance(inputs, Lookup) else inputs[part], self.outputs[part]
        )

    def dot(self, vectors: Float[Tensor, "q groups o i"]) -> Float[Tensor, "q n"]:
        """Return the dot product of each vector with each gradient."""
        if isinstance(self.inputs, Lookup):
            tables, index = vectors.reshape(len(vectors), *self.shape)[:, 0], self.inputs.index
            return torch.stack([torch.einsum("dnt,ntd->n", table[:, index], self.outputs[:, 0]) for table in tables])
        flat = vectors.flatten(1)
        return torch.cat([flat @ few.gradients().flatten(1).T for _, few in self.chunks()], dim=1)

    def squared_norms(self) -> Float[Tensor, " n"]:
        """Return each gradient's squared norm."""
        if isinstance(self.inputs, Lookup):
            return self.outputs.square().sum((1, 2, 3))
        if self.positions == 1:
            return (self.inputs.square().sum((2, 3)) * self.outputs.square().sum((2, 3))).sum(1)
        return torch.cat([few.gradients().square().sum((1, 2, 3)) for _, few in self.chunks()])

    def as_vectors(self) -> FactoredGradients:
        """Return the same gradients as one vector each, `(n, 1, 1, elements)` as outputs."""
        flat = self.gradients().flatten(1)[:, None, None]
        return FactoredGradients(flat.new_ones(len(flat), 1, 1, 1), flat)

    def sum(self) -> Float[Tensor, "groups o i"]:
        """Return the sum of all gradients."""
        if isinstance(self.inputs, Lookup):
            return self.inputs.summed(self.outputs[:, 0])
        return _by_group(self.outputs).mT @ _by_group(self.inputs)

    def scale(self, factors: Float[Tensor, " n"]) -> FactoredGradients:
        """Return the rows with each sample's gradient multiplied by a number."""
        return FactoredGradients(self.inputs, self.outputs * factors.to(self.outputs)[:, None, None, None])


def elements_in_memory(gradients: Mapping[str, FactoredGradients]) -> int:
    """Return the number of elements that all blocks' factors keep in memory."""
    return sum(block.stored_elements for block in gradients.values())


def concatenate_positions(parts: Sequence[FactoredGradients]) -> FactoredGradients:
    """Return the rows of the same samples with the sums over all parts' positions as gradients."""
    if len(parts) == 1:
        return parts[0]
    held = [part.inputs for part in parts]
    outputs = torch.cat([part.outputs for part in parts], dim=2)
    lookups = [inputs for inputs in held if isinstance(inputs, Lookup)]
    if len(lookups) == len(parts):
        return merge_repeated_rows(
            torch.cat([lookup.index for lookup in lookups], dim=1), outputs[:, 0], lookups[0].count
        )
    dense = [inputs.dense().to(outputs) if isinstance(inputs, Lookup) else inputs for inputs in held]
    return FactoredGradients(torch.cat(dense, dim=2), outputs)


def concatenate_samples(parts: Sequence[FactoredGradients]) -> FactoredGradients:
    """Return rows of different samples one after the other; shorter ones are filled up with zeros."""
    most = max(part.positions for part in parts)
    outputs = torch.cat([F.pad(part.outputs, (0, 0, 0, most - part.positions)) for part in parts])
    lookups = [part.inputs for part in parts if isinstance(part.inputs, Lookup)]
    if lookups:
        index = torch.cat([F.pad(lookup.index, (0, most - lookup.index.shape[1])) for lookup in lookups])
        return FactoredGradients(Lookup(index, lookups[0].count), outputs)
    dense = [part.inputs for part in parts if isinstance(part.inputs, Tensor)]
    return FactoredGradients(torch.cat([F.pad(inputs, (0, 0, 0, most - inputs.shape[2])) for inputs in dense]), outputs)


def merge_repeated_rows(index: Int[Tensor, "n t"], grads: Float[Tensor, "n t d"], count: int) -> FactoredGradients:
    """Return rows of a lookup table, the gradients of a row that a sample took several times summed into one."""
    same = index[:, :, None] == index[:, None, :]
    earlier = torch.ones_like(same[0]).tril(-1)
    first = ~(same & earlier).any(dim=2)
    summed = (same.to(grads) @ grads) * first[:, :, None]
    return FactoredGradients(Lookup(index, count), summed[:, None])


def dot_products(left: FactoredGradients, right: FactoredGradients) -> Float[Tensor, "n m"]:
    """Return all dot products of the gradients of two sets of samples, in the cheaper order.

    With one position each, (a ⊗ g)·(a′ ⊗ g′) = (a·a′)(g·g′): nothing of the gradient's size is made.
    """
    groups, o, i = left.shape
    pairs = left.positions * right.positions
    single = pairs == groups == 1
    a, b = left.inputs, right.inputs
    cheaper = left.shape == right.shape and (single or pairs * (i + o) < o * i)
    if isinstance(a, Tensor) and isinstance(b, Tensor) and cheaper:
        if single:
            return (a[:, 0, 0] @ b[:, 0, 0].T) * (left.outputs[:, 0, 0] @ right.outputs[:, 0, 0].T)
        inside = _by_group(a) @ _by_group(b).mT
        outside = _by_group(left.outputs) @ _by_group(right.outputs).mT
        product = (inside * outside).unflatten(2, (len(right), -1)).unflatten(1, (len(left), -1))
        return product.sum(dim=(0, 2, 4))
    return torch.cat([right.dot(few.gradients()) for _, few in left.chunks()])


def _by_group(part: Float[Tensor, "n groups t d"]) -> Float[Tensor, "groups nt d"]:
    return part.transpose(0, 1).flatten(1, 2)
