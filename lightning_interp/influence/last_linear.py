"""The last linear layer of a network: which one it is, and whether it can be retrained alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp.data.batch import device_of, to_device
from lightning_interp.data.task import Task
from lightning_interp.network.undisturbed import hooked, undisturbed

HALF_PRECISION = 2e-2  # relative: a layer under autocast in bfloat16 (2⁻⁸ per operation) still returns W x + b
REPLACEMENT_SCALE = 9.0  # of the noise in the layer's place: large enough for a clipping behind the layer to show


class _LinearCall(NamedTuple):
    """One call of a linear layer."""

    layer: str
    args: tuple[Any, ...]
    output: Tensor


def last_linear(model: nn.Module, task: Task, batch: Any) -> str:
    """Return the name of the linear layer whose output is the network's own.

    Args:
        model: it runs in eval mode, and is left as it was.
        task: how to call it, and its loss per sample.
        batch: of a few samples.

    Raises:
        ValueError: there is none, it is no plain linear layer with trained parameters of its own, or the loss is that
            of training steps, or cannot be computed from float64 on the CPU.
    """
    if task.step is not None:
        raise ValueError(
            "task: expected a loss of outputs and targets to retrain the last layer by, got training steps"
        )
    batch = to_device(batch, device_of(model))
    with undisturbed(model), torch.no_grad():
        calls, outputs = _linear_calls(model, task, batch)
        last = next((call for call in reversed(calls) if _equal_values(call.output, outputs)), None)
        # Equal values may be chance, as of zeros: the outputs must follow when the layer returns something else.
        if last is None or not _outputs_follow(model, task, batch, last):
            raise ValueError(
                "model: expected outputs that are those of a last nn.Linear, to retrain it alone; those of"
                f" {type(model).__name__} are of another shape, or changed behind it"
            )
    if [call.layer for call in calls].count(last.layer) > 1:
        raise ValueError(f"model: expected a last layer that is called once, got {last.layer!r}, which is called again")
    _check_layer(model, last)
    _check_loss(task, outputs, task.targets(batch))
    return last.layer


def _linear_calls(model: nn.Module, task: Task, batch: Any) -> tuple[list[_LinearCall], Tensor]:
    """Return all calls of linear layers in one forward, in their order, and the outputs."""
    calls: list[_LinearCall] = []
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with hooked(model, names, lambda name, _, args, output: calls.append(_LinearCall(name, args, output))):
        outputs = task.outputs(model, task.inputs(batch))
    return calls, outputs


def _outputs_follow(model: nn.Module, task: Task, batch: Any, call: _LinearCall) -> bool:
    """Say whether the network returns what is put in the place of a layer's output."""
    replacement = torch.randn_like(call.output) * REPLACEMENT_SCALE
    with hooked(model, [call.layer], lambda *_: replacement):
        outputs = task.outputs(model, task.inputs(batch))
    return _equal_values(replacement, outputs)


def _equal_values(layer_output: Tensor, outputs: Tensor) -> bool:
    """Say whether outputs are those of a layer, sample by sample, in one shape or another."""
    same_size = layer_output.numel() == outputs.numel() and len(layer_output) == len(outputs)
    return same_size and torch.equal(layer_output.flatten(), outputs.to(layer_output).flatten())


def _check_layer(model: nn.Module, call: _LinearCall) -> None:
    name, layer = call.layer, model.get_submodule(call.layer)
    parameters = dict(layer.named_parameters())
    weight, bias = parameters.get("weight"), parameters.get("bias")
    weight_name = f"{name}.weight" if name else "weight"
    parameter_owners = model.named_parameters(remove_duplicate=False)
    owners = [owner for owner, parameter in parameter_owners if weight is not None and parameter is weight]
    if owners != [weight_name] or len(parameters) != 1 + (bias is not None):
        sharing = [owner for owner in owners if owner != weight_name]
        raise ValueError(
            f"model: expected a last layer with a weight of its own, got {name!r}, whose weight is "
            + (f"also {' and '.join(sharing)}" if sharing else f"made of {', '.join(parameters)}")
        )
    if not all(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"model: expected a last layer that is trained, got {name!r}, which is frozen, or its bias is")
    if len(call.args) != 1 or not _returns_linear_map(call.args[0], parameters["weight"], bias, call.output):
        raise ValueError(
            f"model: expected a last layer that is called as layer(x) and returns W x + b, got {name!r}, a"
            f" {type(layer).__name__} that does not"
        )


def _returns_linear_map(inputs: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> bool:
    """Say whether a layer's output is W x + b, as closely as half precision would give it."""
    output = output.to(weight)
    expected = nn.functional.linear(inputs.to(weight), weight, bias)
    return torch.allclose(expected, output, rtol=HALF_PRECISION, atol=HALF_PRECISION * float(output.abs().max()))


def _check_loss(task: Task, outputs: Tensor, targets: Tensor) -> None:
    with torch.enable_grad():
        leaf = outputs.detach().cpu().double().requires_grad_()
        try:
            (slope,) = torch.autograd.grad(task.per_sample(leaf, targets.cpu()).sum(), leaf, create_graph=True)
            if slope.requires_grad:
                torch.autograd.grad(slope.sum(), leaf)
        except RuntimeError as error:
            raise ValueError(
                "task: expected a loss with two derivatives in outputs of float64 on the CPU (its own tensors are to"
                f" follow the outputs), to retrain the last layer by; got: {error}"
            ) from error
