"""Per-sample gradients of parameters that no rule covers, by `torch.func`, or else one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_interp.data.batch import at_least_float32, map_tensors, size, take, tensors
from lightning_interp.data.task import Task
from lightning_interp.influence.gradients.blocks import ParameterBlock
from lightning_interp.influence.gradients.factored import FactoredGradients

ELEMENTS_PER_CHUNK = 2**22


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
        self._called, self._task = _Called(model), task
        held = dict(model.named_parameters())
        self._values = {f"model.{name}": held[name].detach() for block in blocks for name in block.parameters}
        self._fixed = {f"model.{name}": p.detach() for name, p in held.items()}

    def of_losses(self, batch: Any) -> dict[str, FactoredGradients]:
        """Return rows for the gradients of the losses."""
        return self._rows(batch, [], self._task.total)

    def of_outputs(self, batch: Any, weights: Tensor) -> dict[str, FactoredGradients]:
        """Return rows for the gradients of Σ outputs ⊙ weights."""
        return self._rows(batch, [weights], self._weighted)

    def _weighted(self, model: nn.Module, one: Any, weight: Tensor) -> Tensor:
        outputs = self._task.outputs(model, self._task.inputs(one))
        return (outputs[0] * weight.to(outputs)).sum()

    def _rows(self, batch: Any, more: list[Tensor], value: Callable[..., Tensor]) -> dict[str, FactoredGradients]:
        found = (self._at_once if self.vectorised else self._one_by_one)(batch, more, value)
        return {block.name: _vector(block, found, size(batch)) for block in self.blocks}

    def _one_by_one(self, batch: Any, more: list[Tensor], value: Callable[..., Tensor]) -> dict[str, Tensor]:
        held = dict(self._called.named_parameters())
        asked = [held[name] for name in self._values]
        rows = []
        for i in range(size(batch)):
            of_one = value(self._called.model, take(batch, i, i + 1), *(held[i] for held in more))
            rows.append(torch.autograd.grad(of_one, asked, materialize_grads=True))
        return dict(zip(self._values, map(torch.stack, zip(*rows, strict=True)), strict=True))

    def _at_once(self, batch: Any, more: list[Tensor], value: Callable[..., Tensor]) -> dict[str, Tensor]:
        n = size(batch)
        own = [tensor for tensor in tensors(batch) if _per_sample(tensor, n)]

        def of_one(values: dict[str, Tensor], *held: Tensor) -> Tensor:
            rows = iter(held[: len(own)])
            one = map_tensors(lambda tensor: next(rows)[None] if _per_sample(tensor, n) else tensor, batch)
            given = (value, one, *held[len(own) :])
            return functional_call(self._called, {**self._fixed, **values}, given, strict=False)

        dims = (None, *(0 for _ in (*own, *more)))
        per_sample = sum(held.numel() for held in self._values.values())
        every = vmap(
            grad(of_one), in_dims=dims, randomness="different", chunk_size=max(1, ELEMENTS_PER_CHUNK // per_sample)
        )
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no rule for vmap, which then goes one by one
            return every(self._values, *own, *more)


class _Called(nn.Module):
    """A model inside another, so that parameters can be exchanged whatever is called of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, value: Callable[..., Tensor], *given: Any) -> Tensor:
        return value(self.model, *given)


def _per_sample(tensor: Tensor, n: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == n


def _vector(block: ParameterBlock, found: dict[str, Tensor], n: int) -> FactoredGradients:
    values = {name: at_least_float32(found[f"model.{name}"]) for name in block.parameters}
    packed = block.pack(values)
    return FactoredGradients(packed.new_ones(n, 1, 1, 1), packed.transpose(2, 3).reshape(n, 1, 1, -1))


def vector_blocks(model: nn.Module, names: Sequence[str]) -> Iterator[ParameterBlock]:
    """Yield a "vector" block for each named parameter."""
    held = dict(model.named_parameters())
    for name in names:
        yield ParameterBlock(name, (name,), (held[name].shape,), "vector")


def fallback_works(fallback: FallbackGradients, batch: Any) -> bool:
    """Say whether this way can go through the model at all."""
    try:
        fallback.of_losses(batch)
    except Exception:
        return False
    return True
