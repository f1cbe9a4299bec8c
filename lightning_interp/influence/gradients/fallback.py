"""Per-sample gradients of parameters that no rule covers, by `torch.func`, or else one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_interp.data.batch import at_least_float32, count_samples, map_tensors, slice_samples, tensors
from lightning_interp.data.task import Task
from lightning_interp.influence.gradients.blocks import ParameterBlock
from lightning_interp.influence.gradients.factored import FactoredGradients

ELEMENTS_PER_CHUNK = 2**22  # gradients that vmap writes out at a time: 16 MB in float32


class FallbackGradients:
    """Materialised per-sample gradients of some parameters: a vectorised gradient of one sample's forward.

    Args:
        model: in eval mode.
        task: how to call it and its loss.
        blocks: "vector" blocks of the parameters.
        vectorised: by `torch.func`; if not, each sample has a backward of its own, which costs ten times as much.
    """

    def __init__(self, model: nn.Module, task: Task, blocks: Sequence[ParameterBlock], vectorised: bool = True) -> None:
        self.blocks, self.vectorised = list(blocks), vectorised
        self._wrapper, self._task = _Wrapper(model), task
        self._names = [f"model.{name}" for block in blocks for name in block.parameters]

    def of_losses(self, batch: Any) -> dict[str, FactoredGradients]:
        """Return each block's gradients of the losses."""
        return self._gradients(batch, [], self._task.total)

    def of_outputs(self, batch: Any, weights: Tensor) -> dict[str, FactoredGradients]:
        """Return each block's gradients of Σ outputs ⊙ weights, sample by sample."""
        return self._gradients(batch, [weights], self._weighted_output)

    def _weighted_output(self, model: nn.Module, sample: Any, weight: Tensor) -> Tensor:
        outputs = self._task.outputs(model, self._task.inputs(sample))
        return (outputs[0] * weight.to(outputs)).sum()

    def _gradients(
        self, batch: Any, weights: list[Tensor], value: Callable[..., Tensor]
    ) -> dict[str, FactoredGradients]:
        """Return the gradients of `value(model, sample, *its weights)`."""
        gradients = (self._by_vmap if self.vectorised else self._one_by_one)(batch, weights, value)
        return {block.name: _as_vectors(block, gradients, count_samples(batch)) for block in self.blocks}

    def _one_by_one(self, batch: Any, weights: list[Tensor], value: Callable[..., Tensor]) -> dict[str, Tensor]:
        parameters = [self._wrapper.get_parameter(name) for name in self._names]
        by_sample = []
        for i in range(count_samples(batch)):
            sample_value = value(
                self._wrapper.model, slice_samples(batch, i, i + 1), *(weight[i] for weight in weights)
            )
            by_sample.append(torch.autograd.grad(sample_value, parameters, materialize_grads=True))
        return dict(zip(self._names, map(torch.stack, zip(*by_sample, strict=True)), strict=True))

    def _by_vmap(self, batch: Any, weights: list[Tensor], value: Callable[..., Tensor]) -> dict[str, Tensor]:
        n = count_samples(batch)
        mapped = [tensor for tensor in tensors(batch) if _is_per_sample(tensor, n)]
        # Read anew each time, since another checkpoint or device may have given the model other tensors.
        constants = {name: parameter.detach() for name, parameter in self._wrapper.named_parameters()}
        variables = {name: constants[name] for name in self._names}

        def value_of_sample(values: dict[str, Tensor], *rows: Tensor) -> Tensor:
            remaining = iter(rows[: len(mapped)])
            # vmap removes the dimension of the samples, which the model expects.
            sample = map_tensors(lambda t: next(remaining)[None] if _is_per_sample(t, n) else t, batch)
            arguments = (value, sample, *rows[len(mapped) :])
            return functional_call(self._wrapper, {**constants, **values}, arguments, strict=False)

        dims = (None, *(0 for _ in (*mapped, *weights)))
        chunk_size = max(1, ELEMENTS_PER_CHUNK // sum(variable.numel() for variable in variables.values()))
        gradients = vmap(grad(value_of_sample), in_dims=dims, randomness="different", chunk_size=chunk_size)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no rule for vmap, which then goes one by one
            return gradients(variables, *mapped, *weights)


class _Wrapper(nn.Module):
    """A model inside another, so that `functional_call` can exchange parameters for any function of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, value: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return value(self.model, *arguments)


def _is_per_sample(tensor: Tensor, n: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == n


def _as_vectors(block: ParameterBlock, gradients: dict[str, Tensor], n: int) -> FactoredGradients:
    values = {name: at_least_float32(gradients[f"model.{name}"]) for name in block.parameters}
    packed = block.pack(values)
    return FactoredGradients(packed.new_ones(n, 1, 1, 1), packed.transpose(2, 3).reshape(n, 1, 1, -1))


def vector_blocks(model: nn.Module, names: Sequence[str]) -> Iterator[ParameterBlock]:
    """Yield a "vector" block for each named parameter."""
    for name in names:
        yield ParameterBlock(name, (name,), (model.get_parameter(name).shape,), "vector")
