"""Blocks: which parameters make up one matrix of gradients, and how they are laid out in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

BlockLayout = Literal["matrix", "table", "vector"]


@dataclass(frozen=True)
class ParameterBlock:
    """Parameters whose gradients are laid out as one matrix per group, `(groups, o, i)`.

    Args:
        name: of the layer or parameter.
        parameters: their names in the model; of a matrix the weight first, then its bias, if that is trained.
        shapes: their shapes.
        layout: "matrix" (weight `(groups · o, i, ...)`, the bias as last column), "table" (weight `(i, o)` of an
            embedding, whose rows are indexed), or "vector" (all parameters in a row, `(1, p, 1)`).
        groups: of a grouped convolution, or the maps that one weight holds.
    """

    name: str
    parameters: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    layout: BlockLayout = "matrix"
    groups: int = 1

    @property
    def size(self) -> int:
        """Number of elements of its parameters."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one gradient, `(groups, o, i)`."""
        first = self.shapes[0]
        if self.layout == "vector":
            return 1, self.size, 1
        if self.layout == "table":
            return 1, first[1], first[0]
        return self.groups, first[0] // self.groups, prod(first[1:]) + len(self.shapes) - 1

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the parameters' values `(*lead, *shape of each)` as `(*lead, groups, o, i)`."""
        parameters = [values[name] for name in self.parameters]
        lead = parameters[0].shape[: parameters[0].ndim - len(self.shapes[0])]
        if self.layout == "vector":
            return torch.cat([value.reshape(*lead, -1) for value in parameters], dim=-1)[..., None, :, None]
        if self.layout == "table":
            return parameters[0].transpose(-1, -2)[..., None, :, :]
        groups, o, _ = self.shape
        return torch.cat([value.reshape(*lead, groups, o, -1) for value in parameters], dim=-1)

    def unpack(self, gradients: Tensor) -> dict[str, Tensor]:
        """Return `(*lead, groups, o, i)` as values of each parameter, `(*lead, *its shape)`."""
        lead = gradients.shape[:-3]
        if self.layout == "vector":
            values = gradients.flatten(-3).split([prod(shape) for shape in self.shapes], dim=-1)
        elif self.layout == "table":
            values = (gradients.squeeze(-3).transpose(-1, -2),)
        else:
            width = prod(self.shapes[0][1:])
            values = gradients.split([width] + [1] * (len(self.shapes) - 1), dim=-1)
        triples = zip(self.parameters, values, self.shapes, strict=True)
        return {name: value.reshape((*lead, *shape)) for name, value, shape in triples}
