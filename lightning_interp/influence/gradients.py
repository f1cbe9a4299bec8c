"""Per-sample gradients of linear and convolutional layers, from one batched backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_interp.batch import precise, size, take
from lightning_interp.capture import hooked
from lightning_interp.task import Task

Gradients = dict[str, Tensor]
LARGEST_BLOCK = 2**24


@dataclass(frozen=True, eq=False)
class Rows:
    """One layer's inputs and output gradients, laid out so that a sample's gradient is a sum of outer products.

    ∂ℓ_n/∂W_g = Σ_t outputs[n, g, t] inputs[n, g, t]ᵀ, t running over positions and calls, g over groups of a
    convolution; a last input column of ones stands for the bias.

    Args:
        inputs: `(n, groups, t, i)`.
        outputs: `(n, groups, t, o)`.
    """

    inputs: Float[Tensor, "n groups t i"]
    outputs: Float[Tensor, "n groups t o"]

    @property
    def shape(self) -> torch.Size:
        """Shape of one sample's gradient, `(groups, o, i)`."""
        return torch.Size((self.inputs.shape[1], self.outputs.shape[3], self.inputs.shape[3]))

    def gradients(self) -> Float[Tensor, "n groups o i"]:
        """Return each sample's gradient."""
        return self.outputs.transpose(2, 3) @ self.inputs

    def blocks(self) -> Iterator[tuple[slice, Rows]]:
        """Yield the samples in blocks whose gradients fit in 64 MB (float32)."""
        n, step = len(self.inputs), max(1, LARGEST_BLOCK // self.shape.numel())
        for start in range(0, n, step):
            part = slice(start, min(n, start + step))
            yield part, Rows(self.inputs[part], self.outputs[part])


class Trace:
    """One forward of a batch, from which output gradients of every covered layer can be asked again and again.

    Args:
        model: in eval mode (see `lightning_interp.capture.differentiable`).
        layers: names of linear and convolutional layers.
        task: how to call the model and its loss.
        batch: on the model's device.

    Attributes:
        outputs: the model's outputs.
        targets: the batch's targets.
        losses: loss per sample, `(n,)`.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], task: Task, batch: Any) -> None:
        self._parts = {layer: model.get_submodule(layer) for layer in layers}
        self._calls: list[tuple[str, Tensor, Tensor]] = []
        with hooked(model, layers, self._note):
            self.outputs, self.targets, self.losses = task.losses(model, batch)
        self._inputs = [_layer_inputs(self._parts[layer], given) for layer, given, _ in self._calls]

    def _note(self, layer: str, part: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        if not given:
            return output
        node = output if output.requires_grad else output.detach().requires_grad_()
        self._calls.append((layer, given[0].detach(), node))
        return node.clone()

    def rows(self, of: Tensor, weights: Tensor | None = None, keep: bool = False) -> dict[str, Rows]:
        """Return each layer's rows for the gradient of `of`, weighted by `weights` of the same shape.

        Args:
            of: losses `(n,)` or outputs; row n may depend on sample n alone.
            weights: what to contract `of` with; ones when None.
            keep: whether the trace will be asked again.
        """
        weights = torch.ones_like(of) if weights is None else weights
        nodes = [node for _, _, node in self._calls]
        found = torch.autograd.grad(of, nodes, weights, retain_graph=keep, allow_unused=True)
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for (layer, _, node), inputs, grad in zip(self._calls, self._inputs, found, strict=True):
            outputs = _layer_outputs(self._parts[layer], torch.zeros_like(node) if grad is None else grad)
            calls.setdefault(layer, []).append((inputs, precise(outputs)))
        return {layer: _joined(pairs) for layer, pairs in calls.items()}


def layers_of(model: nn.Module) -> list[str]:
    """Return the linear and convolutional layers whose weights are trained and used by no other module."""
    uses: dict[int, int] = {}
    for part in model.modules():
        for parameter in part.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return [
        name
        for name, part in model.named_modules()
        if type(part) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        and isinstance(part._parameters.get("weight"), nn.Parameter)
        and part.weight.requires_grad
        and all(uses[id(p)] == 1 for p in part.parameters(recurse=False))
    ]


def verified_layers(model: nn.Module, layers: Sequence[str], task: Task, batch: Any) -> list[str]:
    """Return the layers whose per-sample gradients equal autograd's own, for the first two samples of a batch.

    A weight that is also used outside its layer's forward, or a layer whose input does not have one row per
    sample in front, fails.
    """
    few = take(batch, 0, 3)
    trace = Trace(model, layers, task, few)
    rows = {layer: r for layer, r in trace.rows(trace.losses, keep=True).items() if len(r.inputs) == size(few)}
    weights = [model.get_submodule(layer).get_parameter("weight") for layer in rows]
    if not weights:
        return []
    good = set(rows)
    for sample, loss in enumerate(trace.losses[:2]):
        expected = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        for layer, grad in zip(rows, expected, strict=True):
            if grad is None or not _close(rows[layer].gradients()[sample], grad):
                good.discard(layer)
    return [layer for layer in layers if layer in good]


def parameters_of(model: nn.Module, layers: Sequence[str]) -> dict[str, int]:
    """Return the number of elements of each trained parameter of these layers."""
    return {
        f"{layer}.{name}": parameter.numel()
        for layer in layers
        for name, parameter in model.get_submodule(layer).named_parameters(recurse=False)
        if parameter.requires_grad
    }


def _close(ours: Tensor, grad: Tensor) -> bool:
    ours = ours.reshape(-1, ours.shape[-1])[:, : grad[0].numel()].reshape(grad.shape)
    scale = grad.abs().max().clamp(min=torch.finfo(grad.dtype).tiny)
    return bool((ours - grad).abs().max() <= 2e-2 * scale)


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> Rows:
    if len(pairs) == 1:
        return Rows(*pairs[0])
    inputs, outputs = zip(*pairs, strict=True)
    return Rows(torch.cat(inputs, dim=2), torch.cat(outputs, dim=2))


def _layer_inputs(part: Any, given: Tensor) -> Tensor:
    """Return `(n, groups, t, i)`: what each weight was multiplied with, and a column of ones for a bias."""
    given = precise(given)
    rows = given.reshape(len(given), 1, -1, given.shape[-1]) if isinstance(part, nn.Linear) else _patches(part, given)
    if part.bias is None or not part.bias.requires_grad:
        return rows
    return torch.cat([rows, rows.new_ones(*rows.shape[:3], 1)], dim=3)


def _layer_outputs(part: Any, grad: Tensor) -> Tensor:
    """Return output gradients as `(n, groups, t, o)`."""
    if isinstance(part, nn.Linear):
        return grad.reshape(len(grad), 1, -1, grad.shape[-1])
    groups: int = part.groups
    return grad.reshape(len(grad), groups, grad.shape[1] // groups, -1).transpose(2, 3)


def _patches(part: Any, given: Tensor) -> Tensor:
    """Return the patches a convolution of any dimension sees, `(n, groups, positions, channels · kernel)`."""
    spatial = len(part.kernel_size)
    mode = "constant" if part.padding_mode == "zeros" else part.padding_mode
    windows = F.pad(given, part._reversed_padding_repeated_twice, mode=mode)
    for axis in range(spatial):
        reach = part.dilation[axis] * (part.kernel_size[axis] - 1) + 1
        windows = windows.unfold(2 + axis, reach, part.stride[axis])[..., :: part.dilation[axis]]
    n, channels, positions = len(given), given.shape[1], windows.shape[2 : 2 + spatial]
    windows = windows.reshape(n, part.groups, channels // part.groups, positions.numel(), -1)
    return windows.transpose(2, 3).flatten(3)
