"""Which linear layer's output is the network's own, so that it can be retrained alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.batch import device_of, to_device
from lightning_interp.capture import hooked, undisturbed
from lightning_interp.task import Task

ROUNDED = 2e-2
FAR = 9.0


def last_linear(model: nn.Module, task: Task, batch: Any) -> str:
    """Return the name of the linear layer whose output is the network's own.

    Args:
        model: it runs in eval mode, and is left as it was.
        task: how to call it, and its loss per sample.
        batch: of a few samples.

    Raises:
        ValueError: there is none, it is no plain linear layer with trained parameters of its own, or the loss is that
            of training steps, or cannot be taken of float64 on the CPU.
    """
    if task.step is not None:
        raise ValueError(
            "task: expected a loss of outputs and targets to retrain the last layer by, got training steps"
        )
    calls: list[tuple[str, Any, Tensor]] = []
    batch = to_device(batch, device_of(model))
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    noting = hooked(model, names, lambda name, _, given, made: calls.append((name, given, made)))
    with undisturbed(model), torch.no_grad():
        with noting:
            outputs = task.outputs(model, task.inputs(batch))
        name, given, made = next(filter(lambda call: _same(call[2], outputs), reversed(calls)), ("", (), None))
        other = None if made is None else torch.randn_like(made) * FAR
        with hooked(model, names, lambda called, *_: other if called == name else None):
            replaced = task.outputs(model, task.inputs(batch))
    if made is None or other is None or not _same(other, replaced):
        raise ValueError(
            "model: expected outputs that are those of a last nn.Linear, to retrain it alone; those of"
            f" {type(model).__name__} are of another shape, or changed behind it"
        )
    if [called for called, _, _ in calls].count(name) > 1:
        raise ValueError(f"model: expected a last layer that is called once, got {name!r}, which is called again")
    _check_plain(model, name, given, made)
    _check_loss(task, outputs, task.targets(batch))
    return name


def _same(made: Tensor, outputs: Tensor) -> bool:
    """Say whether outputs are those of a layer, sample by sample, in one shape or another."""
    alike = made.numel() == outputs.numel() and len(made) == len(outputs)
    return alike and torch.equal(made.flatten(), outputs.to(made).flatten())


def _check_plain(model: nn.Module, name: str, given: tuple[Any, ...], made: Tensor) -> None:
    layer = model.get_submodule(name)
    own = dict(layer.named_parameters())
    weight, bias = own.get("weight"), own.get("bias")
    owners = [held for held, p in model.named_parameters(remove_duplicate=False) if weight is not None and p is weight]
    wanted = f"{name}.weight" if name else "weight"
    if owners != [wanted] or len(own) != 1 + (bias is not None):
        others = [held for held in owners if held != wanted]
        raise ValueError(
            f"model: expected a last layer with a weight of its own, got {name!r}, whose weight is "
            + (f"also {' and '.join(others)}" if others else f"made of {', '.join(own)}")
        )
    if not all(p.requires_grad for p in own.values()):
        raise ValueError(f"model: expected a last layer that is trained, got {name!r}, which is frozen, or its bias is")
    if len(given) != 1 or not _plain(given[0], own["weight"], bias, made):
        raise ValueError(
            f"model: expected a last layer that is called as layer(x) and returns W x + b, got {name!r}, a"
            f" {type(layer).__name__} that does not"
        )


def _plain(given: Tensor, weight: Tensor, bias: Tensor | None, made: Tensor) -> bool:
    """Say whether a layer returns W x + b, as closely as half precision would."""
    made = made.to(weight)
    wanted = nn.functional.linear(given.to(weight), weight, bias)
    return torch.allclose(wanted, made, rtol=ROUNDED, atol=ROUNDED * float(made.abs().max()))


def _check_loss(task: Task, outputs: Tensor, targets: Tensor) -> None:
    with torch.enable_grad():
        free = outputs.detach().cpu().double().requires_grad_()
        try:
            (slope,) = torch.autograd.grad(task.per_sample(free, targets.cpu()).sum(), free, create_graph=True)
            if slope.requires_grad:
                torch.autograd.grad(slope.sum(), free)
        except RuntimeError as error:
            raise ValueError(
                "task: expected a loss with two derivatives in outputs of float64 on the CPU (its own tensors are to"
                f" follow the outputs), to retrain the last layer by; got: {error}"
            ) from error
