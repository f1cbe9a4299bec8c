"""Per-sample gradients of parameters that no rule covers, by `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_interp.batch import map_tensors, precise, size, tensors
from lightning_interp.influence.blocks import Block
from lightning_interp.influence.rows import Rows
from lightning_interp.task import Task

AT_ONCE = 2**22


class Leftover:
    """Materialised per-sample gradients of some parameters: a vectorised gradient of one sample's forward.

    Args:
        model: in eval mode.
        task: how to call it and its loss.
        blocks: "vector" blocks of the parameters.
    """

    def __init__(self, model: nn.Module, task: Task, blocks: Sequence[Block]) -> None:
        self.blocks = list(blocks)
        self._called, self._task = _Called(model, task), task
        held = dict(model.named_parameters())
        self._values = {f"model.{name}": held[name].detach() for block in blocks for name in block.parameters}
        self._fixed = {f"model.{name}": p.detach() for name, p in held.items()}

    def of_losses(self, batch: Any) -> dict[str, Rows]:
        """Return rows for the gradients of the losses."""
        return self._rows(batch, [], lambda _, losses: losses.sum())

    def of_outputs(self, batch: Any, weights: Tensor) -> dict[str, Rows]:
        """Return rows for the gradients of Σ outputs ⊙ weights."""
        return self._rows(batch, [weights], lambda outputs, _, weight: (outputs[0] * weight.to(outputs)).sum())

    def _rows(self, batch: Any, more: list[Tensor], value: Callable[..., Tensor]) -> dict[str, Rows]:
        n = size(batch)
        own = [tensor for tensor in tensors(batch) if _per_sample(tensor, n)]

        def of_one(values: dict[str, Tensor], *held: Tensor) -> Tensor:
            rows = iter(held[: len(own)])
            one = map_tensors(lambda tensor: next(rows)[None] if _per_sample(tensor, n) else tensor, batch)
            outputs, losses = functional_call(self._called, {**self._fixed, **values}, (one,), strict=False)
            return value(outputs, losses, *held[len(own) :])

        dims = (None, *(0 for _ in (*own, *more)))
        per_sample = sum(held.numel() for held in self._values.values())
        every = vmap(grad(of_one), in_dims=dims, randomness="different", chunk_size=max(1, AT_ONCE // per_sample))
        found = every(self._values, *own, *more)
        return {block.name: _vector(block, found, n) for block in self.blocks}


class _Called(nn.Module):
    """A model and its task as one module, so that parameters can be exchanged whatever the task calls."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self._task = model, task

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        outputs, _, losses = self._task.losses(self.model, batch)
        return outputs, losses


def _per_sample(tensor: Tensor, n: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == n


def _vector(block: Block, found: dict[str, Tensor], n: int) -> Rows:
    values = {name: precise(found[f"model.{name}"]) for name in block.parameters}
    packed = block.pack(values)
    return Rows(packed.new_ones(n, 1, 1, 1), packed.transpose(2, 3).reshape(n, 1, 1, -1))


def vectors(model: nn.Module, names: Sequence[str]) -> Iterator[Block]:
    """Yield a "vector" block for each named parameter."""
    held = dict(model.named_parameters())
    for name in names:
        yield Block(name, (name,), (held[name].shape,), "vector")


def works(leftover: Leftover, batch: Any) -> bool:
    """Say whether `torch.func` can go through this model at all."""
    try:
        leftover.of_losses(batch)
    except Exception:
        return False
    return True
