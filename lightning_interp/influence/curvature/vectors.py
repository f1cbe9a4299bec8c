"""The covered parameters as one vector, and many vectors sent through a backward at once."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_interp.influence.curvature.curvature import Shift
from lightning_interp.influence.gradients.coverage import Coverage


@dataclass(frozen=True, eq=False)
class Space:
    """All blocks' parameters side by side: where a vector's elements belong.

    Args:
        coverage: the covered network.
    """

    coverage: Coverage

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(block.size for block in self.coverage.blocks.values())

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters themselves."""
        parameters = dict(self.coverage.model.named_parameters())
        return [parameters[name] for block in self.coverage.blocks.values() for name in block.parameters]

    def blocks(self, vectors: Float[Tensor, "q p"]) -> dict[str, Tensor]:
        """Return vectors by blocks, `(q, groups, o, i)`."""
        shapes = self.coverage.shapes
        flat = vectors.split([prod(shape) for shape in shapes.values()], dim=1)
        return {name: vector.reshape(-1, *shapes[name]) for name, vector in zip(shapes, flat, strict=True)}

    def joined(self, blocks: Mapping[str, Tensor]) -> Float[Tensor, "q p"]:
        """Return blocks `(q, groups, o, i)` as vectors."""
        return torch.cat([blocks[name].flatten(1) for name in self.coverage.blocks], dim=1)

    def spread(self, vectors: Float[Tensor, "q p"]) -> list[Tensor]:
        """Return vectors by parameters, `(q, *shape)`, in the parameters' types."""
        by_block = self.blocks(vectors)
        values: dict[str, Tensor] = {}
        for name, block in self.coverage.blocks.items():
            values |= block.unpack(by_block[name])
        return [value.to(parameter) for value, parameter in zip(values.values(), self.parameters, strict=True)]

    def gathered(self, values: Sequence[Tensor]) -> Float[Tensor, "q p"]:
        """Return values by parameters, `(q, *shape)`, as vectors."""
        names = [name for block in self.coverage.blocks.values() for name in block.parameters]
        return self.joined(self.coverage.pack(dict(zip(names, values, strict=True))))

    def diagonal(self, shift: Shift, like: Tensor) -> Float[Tensor, " p"]:
        """Return Λ's diagonal, in the type of `like`."""
        shapes = self.coverage.shapes
        diagonals = [torch.as_tensor(shift[name]).to(like).expand(shape).flatten() for name, shape in shapes.items()]
        return torch.cat(diagonals)


def vector_jacobian_products(of: Sequence[Tensor], at: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """Return Jᵀv for many vectors v, J the Jacobian of `of` by `at`; the graph is kept.

    Vectorised over the vectors, or one by one where an operation cannot be.

    Args:
        of: tensors.
        at: tensors that they depend on; zeros for one that they do not.
        vectors: `(q, *shape of each of)`.

    Returns:
        `(q, *shape of each at)`.
    """
    differentiable = [index for index, tensor in enumerate(of) if tensor.requires_grad]
    if not differentiable:
        return [tensor.new_zeros(len(vectors[0]), *tensor.shape) for tensor in at]
    of, vectors = [of[index] for index in differentiable], [vectors[index] for index in differentiable]
    with contextlib.suppress(RuntimeError):
        return list(_grad(of, at, vectors, batched=True))
    single = [_grad(of, at, [vector[row] for vector in vectors]) for row in range(len(vectors[0]))]
    return [torch.stack(rows) for rows in zip(*single, strict=True)]


def _grad(
    of: Sequence[Tensor], at: Sequence[Tensor], vectors: Sequence[Tensor], batched: bool = False
) -> Sequence[Tensor]:
    return torch.autograd.grad(
        of, at, vectors, retain_graph=True, is_grads_batched=batched, allow_unused=True, materialize_grads=True
    )


def twice_differentiable() -> contextlib.AbstractContextManager[None]:
    """Open a context whose forward can be differentiated twice: attention written out, not in one fused operation."""
    return sdpa_kernel(SDPBackend.MATH)
