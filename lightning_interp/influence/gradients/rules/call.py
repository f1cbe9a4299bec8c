"""What a rule receives of a layer's call, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_interp.data.batch import at_least_float32, tensors
from lightning_interp.influence.gradients.factored import Lookup


class ParameterUse(NamedTuple):
    """One place where parameters entered the forward.

    Args:
        parameters: attribute names of the layer: a weight and its bias, or several vectors.
        inputs: what the weight was multiplied with, `(n, groups, t, i)` without the bias's ones, or a `Lookup`.
        node: the tensor whose gradient is taken.
        arrange: gradient of the node → `(n, groups, t, o)`.
    """

    parameters: tuple[str, ...]
    inputs: Tensor | Lookup
    node: Tensor
    arrange: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer.

    Args:
        layer: the module.
        args: what it was called with.
        kwargs: and the keywords.
        output: what it returned.
        axis: the dimension of its inputs along which samples lie.
    """

    layer: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    axis: int

    def argument(self, position: int, name: str) -> Any:
        """Return the argument at this position or of this name; None where there was none."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)

    @property
    def samples(self) -> int:
        """Number of samples in its first input; 0 where it has no such dimension."""
        first = self.args[0] if self.args else next(iter(self.kwargs.values()), None)
        if isinstance(first, PackedSequence):
            return int(first.batch_sizes[0])
        tensor = first if isinstance(first, Tensor) else next(tensors((self.args, dict(self.kwargs))), None)
        return 0 if tensor is None or tensor.ndim <= self.axis else tensor.shape[self.axis]

    @property
    def inputs(self) -> Tensor:
        """The first input, detached, samples first, at least in single precision."""
        value = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return at_least_float32(self.samples_first(value.detach()))

    def samples_first(self, tensor: Tensor) -> Tensor:
        """Return the tensor with its samples along the first dimension."""
        return tensor if self.axis == 0 else tensor.movedim(self.axis, 0)

    def output_gradient(self, tensor: Tensor) -> Tensor:
        """Return the output's gradient, samples first, at least in single precision."""
        return at_least_float32(self.samples_first(tensor))


Rule = Callable[[LayerCall], tuple[Any, list[ParameterUse]]]


def with_gradient_node(output: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tensor whose gradient can be taken, and a copy for the layers behind, which may write to it in place."""
    node = output if output.requires_grad else output.detach().requires_grad_()
    return node, node.clone()


def trained(layer: nn.Module, *names: str) -> tuple[str, ...]:
    """Return those of a layer's parameters that are trained."""
    parameters = ((name, layer._parameters.get(name)) for name in names)
    return tuple(name for name, parameter in parameters if parameter is not None and parameter.requires_grad)


def ones(like: Tensor) -> Tensor:
    """Return the inputs `(n, 1, 1, 1)` of parameters that are no matrix."""
    return torch.ones(len(like), 1, 1, 1, dtype=at_least_float32(like).dtype, device=like.device)
