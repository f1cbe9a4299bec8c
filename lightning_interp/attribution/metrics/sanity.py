"""Sanity check: does a map change when a layer's weights are reinitialised?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_interp.attribution.attributor import Attributor
from lightning_interp.attribution.engine.explained_input import ExplainedInput
from lightning_interp.attribution.engine.target import Target
from lightning_interp.attribution.metrics.rank_correlation import flat_map, rank_correlation
from lightning_interp.data.batch import select_samples
from lightning_interp.data.task import Task
from lightning_interp.network.undisturbed import explaining, hooked, undisturbed


def sanity_similarity(
    method: Attributor,
    model: nn.Module,
    inputs: Any,
    target: Target,
    task: Task = Task(),
    layer: str | None = None,
    seed: int = 0,
) -> Float[Tensor, " n"]:
    """Return the similarity of maps before and after one layer is reinitialised: near 1, they do not depend on it.

    Spearman's rank correlation of the absolute values per position (`flat_map`), sample by sample; NaN where one of the
    maps is constant or not finite. Tokens that `task.mask` leaves out do not count. The weights are restored. A low
    value does not make a map right, and a high one may come from what both maps share without the layer: inactive
    ReLUs, zeros of a blank background.

    Reference: Adebayo et al., Sanity Checks for Saliency Maps, 2018.

    Args:
        method: the attributor.
        model: any module.
        inputs: what `task.outputs(model, ...)` takes, on the model's device.
        target: class per sample `(n,)`, the same before and after, or a function outputs → `(n,)`.
        task: how to call the model.
        layer: name of the layer, as in `named_modules`; `last_weights` when None.
        seed: of the new weights.

    Raises:
        ValueError: the layer has no weights.
    """
    layer = last_weights(model, inputs, task) if layer is None else layer
    before = method(model, inputs, target, task).maps
    with reinitialized(model, layer, seed):
        after = method(model, inputs, target, task).maps
    raw, mask = task.explained(inputs), task.mask(inputs)
    flat = [flat_map(maps, raw).abs() for maps in (before, after)]
    counts = None if mask is None or mask.shape != flat[0].shape else mask.cpu()
    return rank_correlation(flat[0], flat[1], counts)


@contextlib.contextmanager
def reinitialized(model: nn.Module, layer: str | None = None, seed: int = 0) -> Iterator[None]:
    """Reinitialise one layer's parameters, and restore them exactly on every way out.

    They are drawn by the layer's own `reset_parameters`; where it has none, normally with each parameter's mean and
    standard deviation. Buffers, gradients and every random number generator stay as they are.

    Args:
        model: any module.
        layer: its name, as in `named_modules`, with all that is inside it; when None, the last one there with
            parameters of its own (`last_weights` finds the last that is called).
        seed: of the new weights.

    Raises:
        ValueError: the model has no such layer, or it has no parameters.
    """
    module = _with_weights(model, layer)
    saved = [(parameter, parameter.detach().clone()) for parameter in module.parameters()]
    try:
        # For the random generators, and for buffers: a normalisation resets its running statistics as well.
        with undisturbed(module), torch.no_grad():
            _seed_generators(seed)
            for inner in module.modules():
                _draw_parameters(inner)
        yield
    finally:
        with torch.no_grad():
            for parameter, values in saved:
                parameter.copy_(values)


def last_weights(model: nn.Module, inputs: Any, task: Task = Task()) -> str:
    """Return the name of the last module with parameters of its own that a forward calls: mostly the one of the logits.

    One that contains another such module is skipped.

    Raises:
        ValueError: no module of the model has parameters.
    """
    called: list[str] = []
    layer_names = [name for name, module in model.named_modules() if _has_parameters(module)]
    with explaining(model), torch.no_grad():
        explained = ExplainedInput(model, inputs, task)
        first_sample = select_samples(inputs, explained.everything[:1])
        with hooked(model, layer_names, lambda name, *_: called.append(name)):
            task.outputs(model, first_sample)
    inner = [name for name in called if not any(_is_within(inner_name, name) for inner_name in called)]
    if not inner:
        raise ValueError("model: expected a module with parameters in its forward, found none")
    return inner[-1]


def _with_weights(model: nn.Module, layer: str | None) -> nn.Module:
    submodules = dict(model.named_modules())
    if layer is None:
        layer = next((name for name, module in reversed(submodules.items()) if _has_parameters(module)), "")
    if layer not in submodules or not any(True for _ in submodules[layer].parameters()):
        raise ValueError(f"layer: expected the name of a module with parameters, got {layer!r}")
    return submodules[layer]


def _draw_parameters(module: nn.Module) -> None:
    """Draw new values of a module's own parameters."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    for parameter in module.parameters(recurse=False):
        values = parameter.float()
        parameter.copy_(values.mean() + values.std(correction=0) * torch.randn_like(values))


def _seed_generators(seed: int) -> None:
    """Seed the generators in use; `torch.manual_seed` would also seed a device that is first used later."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _is_within(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(outer + "."))
