"""Per-sample gradients in factored form: what a weight was multiplied with, and the gradient of what came out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

LARGEST_CHUNK = 2**21  # gradient elements written out at a time: 8 MB in float32


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

    def sum_by_row(self, values: Float[Tensor, "n t d"]) -> Float[Tensor, "1 d i"]:
        """Return the sum of all samples' values that belong to each row of the table, without a table for each."""
        d = values.shape[2]
        sums = values.new_zeros(self.count, d).index_add_(0, self.index.flatten(), values.reshape(-1, d))
        return sums.T[None]


@dataclass(frozen=True, eq=False)
class FactoredGradients:
    """One block's gradients, each a sum of outer products: G_n = Σ_t outputs[n, :, t] inputs[n, :, t]ᵀ.

    t runs over positions and calls. A bias is a last input column of ones. Parameters that are no matrix (the scales of
    a normalisation) have the gradient itself as their outputs, and ones as inputs.

    Args:
        inputs: what the weight was multiplied with, `(n, groups, t, i)`, or a `Lookup` (one group).
        outputs: gradient of what came out, `(n, groups, t, o)`.
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
        """Number of elements that the factors keep in memory."""
        inputs = self.inputs.index if isinstance(self.inputs, Lookup) else self.inputs
        return inputs.numel() + self.outputs.numel()

    def gradients(self) -> Float[Tensor, "n groups o i"]:
        """Return each sample's gradient."""
        if isinstance(self.inputs, Lookup):
            n, _, t, o = self.outputs.shape
            tables = self.outputs.new_zeros(n, 1, o, self.inputs.count)
            columns = self.inputs.index[:, None, None, :].expand(n, 1, o, t)
            return tables.scatter_add_(3, columns, self.outputs.transpose(2, 3))
        if self.positions == 1:  # matrices with one column are multiplied slowly on a CPU
            return self.outputs.transpose(2, 3) * self.inputs
        return self.outputs.transpose(2, 3) @ self.inputs

    def chunks(self) -> Iterator[tuple[slice, FactoredGradients]]:
        """Yield the samples in chunks whose gradients fit in 8 MB (float32)."""
        n, step = len(self), max(1, LARGEST_CHUNK // self.size)
        for start in range(0, n, step):
            rows = slice(start, min(n, start + step))
            yield rows, self.at(rows)

    def at(self, rows: slice | Tensor) -> FactoredGradients:
        """Return the gradients of some samples."""
        inputs = self.inputs
        return FactoredGradients(
            Lookup(inputs.index[rows], inputs.count) if isinstance(inputs, Lookup) else inputs[rows], self.outputs[rows]
        )

    def dot(self, vectors: Float[Tensor, "q groups o i"]) -> Float[Tensor, "q n"]:
        """Return the dot product of each vector with each gradient."""
        if isinstance(self.inputs, Lookup):
            tables, index = vectors.reshape(len(vectors), *self.shape)[:, 0], self.inputs.index
            return torch.stack([torch.einsum("dnt,ntd->n", table[:, index], self.outputs[:, 0]) for table in tables])
        flat = vectors.flatten(1)
        return torch.cat([flat @ chunk.gradients().flatten(1).T for _, chunk in self.chunks()], dim=1)

    def squared_norms(self) -> Float[Tensor, " n"]:
        """Return each gradient's squared norm."""
        if isinstance(self.inputs, Lookup):
            # No row of the table appears twice within a sample, so that the squares simply add up.
            return self.outputs.square().sum((1, 2, 3))
        if self.positions == 1:
            return (self.inputs.square().sum((2, 3)) * self.outputs.square().sum((2, 3))).sum(1)
        return torch.cat([chunk.gradients().square().sum((1, 2, 3)) for _, chunk in self.chunks()])

    def as_vectors(self) -> FactoredGradients:
        """Return the same gradients as one vector each, `(n, 1, 1, elements)` as outputs."""
        flat = self.gradients().flatten(1)[:, None, None]
        return FactoredGradients(flat.new_ones(len(flat), 1, 1, 1), flat)

    def sum(self) -> Float[Tensor, "groups o i"]:
        """Return the sum of all gradients."""
        if isinstance(self.inputs, Lookup):
            return self.inputs.sum_by_row(self.outputs[:, 0])
        return _rows_by_group(self.outputs).mT @ _rows_by_group(self.inputs)

    def scale(self, factors: Float[Tensor, " n"]) -> FactoredGradients:
        """Return each sample's gradient multiplied by a number of its own."""
        return FactoredGradients(self.inputs, self.outputs * factors.to(self.outputs)[:, None, None, None])


def elements_in_memory(gradients: Mapping[str, FactoredGradients]) -> int:
    """Return the number of elements that all blocks' factors keep in memory."""
    return sum(block.stored_elements for block in gradients.values())


def concatenate_positions(uses: Sequence[FactoredGradients]) -> FactoredGradients:
    """Return gradients of the same samples that are sums over the positions of all uses of a block."""
    if len(uses) == 1:
        return uses[0]
    inputs = [use.inputs for use in uses]
    outputs = torch.cat([use.outputs for use in uses], dim=2)
    lookups = [factor for factor in inputs if isinstance(factor, Lookup)]
    if len(lookups) == len(uses):
        # Two uses may take the same row, which must appear once.
        index = torch.cat([lookup.index for lookup in lookups], dim=1)
        return merge_repeated_rows(index, outputs[:, 0], lookups[0].count)
    dense = [factor.dense().to(outputs) if isinstance(factor, Lookup) else factor for factor in inputs]
    return FactoredGradients(torch.cat(dense, dim=2), outputs)


def concatenate_samples(batches: Sequence[FactoredGradients]) -> FactoredGradients:
    """Return gradients of different samples one after the other; those of fewer positions are padded with zeros."""
    positions = max(batch.positions for batch in batches)
    outputs = torch.cat([F.pad(batch.outputs, (0, 0, 0, positions - batch.positions)) for batch in batches])
    lookups = [batch.inputs for batch in batches if isinstance(batch.inputs, Lookup)]
    if lookups:
        # Padding takes row 0, with a gradient of zero.
        index = torch.cat([F.pad(lookup.index, (0, positions - lookup.index.shape[1])) for lookup in lookups])
        return FactoredGradients(Lookup(index, lookups[0].count), outputs)
    dense = [batch.inputs for batch in batches if isinstance(batch.inputs, Tensor)]
    inputs = torch.cat([F.pad(factor, (0, 0, 0, positions - factor.shape[2])) for factor in dense])
    return FactoredGradients(inputs, outputs)


def merge_repeated_rows(index: Int[Tensor, "n t"], gradients: Float[Tensor, "n t d"], count: int) -> FactoredGradients:
    """Return a lookup table's gradients, those of a row that a sample took several times summed into one."""
    same_row = index[:, :, None] == index[:, None, :]
    earlier = torch.ones_like(same_row[0]).tril(-1)
    is_first = ~(same_row & earlier).any(dim=2)
    # The first position of a row gets the sum; its later ones stay, with a gradient of zero.
    summed = (same_row.to(gradients) @ gradients) * is_first[:, :, None]
    return FactoredGradients(Lookup(index, count), summed[:, None])


def dot_products(left: FactoredGradients, right: FactoredGradients) -> Float[Tensor, "n m"]:
    """Return all dot products of the gradients of two sets of samples, in the cheaper order.

    With one position each, (a ⊗ g)·(a′ ⊗ g′) = (a·a′)(g·g′): nothing of the gradient's size is computed.
    """
    groups, o, i = left.shape
    pairs = left.positions * right.positions
    single = pairs == groups == 1
    a, b = left.inputs, right.inputs
    # By factors, each pair of positions takes two short dot products; whole gradients take one long one.
    factors_cheaper = left.shape == right.shape and (single or pairs * (i + o) < o * i)
    if isinstance(a, Tensor) and isinstance(b, Tensor) and factors_cheaper:
        if single:
            return (a[:, 0, 0] @ b[:, 0, 0].T) * (left.outputs[:, 0, 0] @ right.outputs[:, 0, 0].T)
        input_products = _rows_by_group(a) @ _rows_by_group(b).mT
        output_products = _rows_by_group(left.outputs) @ _rows_by_group(right.outputs).mT
        products = (input_products * output_products).unflatten(2, (len(right), -1)).unflatten(1, (len(left), -1))
        return products.sum(dim=(0, 2, 4))
    return torch.cat([right.dot(chunk.gradients()) for _, chunk in left.chunks()])


def _rows_by_group(factor: Float[Tensor, "n groups t d"]) -> Float[Tensor, "groups nt d"]:
    return factor.transpose(0, 1).flatten(1, 2)
