"""Sites in a forward: the outputs of layers, and of the functions called after them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_interp.data.batch import map_tensors, tensors
from lightning_interp.network.undisturbed import hooked

AFTER = ">"
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "tanh")
POOLINGS = tuple(f"{kind}_pool{size}d" for kind in ("max", "avg") for size in (1, 2, 3))
OPERATIONS = frozenset((*ACTIVATIONS, *POOLINGS, "add", "iadd"))
Hook = Callable[[str, nn.Module, Tensor], Tensor | None]


def layer_of(site: str) -> str:
    """Return the layer that a site is at or after.

    >>> layer_of("norm3>relu"), layer_of("blocks.2")
    ('norm3', 'blocks.2')
    """
    return site.split(AFTER)[0]


@contextlib.contextmanager
def watch_sites(model: nn.Module, hook: Hook, sites: Sequence[str] | None = None) -> Iterator[None]:
    """Call `hook(site, module, tensor)` for the first tensor that each layer outputs, and for functions after it.

    A site is a layer's name, or `layer>function`: an activation, pooling or sum that is computed by a function or
    method and not by a layer, named after the layer that finished last (`layer>function#1` is the second such). What
    the hook returns, unless None, replaces the tensor.

    Args:
        model: the network.
        hook: receives the site's name, the layer and the tensor.
        sites: which to watch; all when None.
    """
    functions = _FunctionSites(model, hook, sites)

    def finished(layer: str, module: nn.Module, _: Any, output: Any) -> Any:
        functions.start_after(layer, module)
        if not (sites is None or layer in sites):
            return None
        with torch._C.DisableTorchFunction():  # what the hook computes is no part of the forward
            first = next(tensors(output), None)
            replaced = hook(layer, module, first) if first is not None and first.is_floating_point() else None
            return None if replaced is None else map_tensors(lambda t: replaced if t is first else t, output)

    with hooked(model, [name for name, _ in model.named_modules() if name], finished), functions:
        yield


class _FunctionSites(TorchFunctionMode):
    def __init__(self, model: nn.Module, hook: Hook, sites: Sequence[str] | None) -> None:
        super().__init__()
        self.hook, self.sites = hook, sites
        self.start_after("", model)

    def start_after(self, layer: str, module: nn.Module) -> None:
        """Note the layer that finished last; its functions are counted from 0."""
        self.layer, self.module, self.counts = layer, module, dict[str, int]()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        layer, module = self.layer, self.module
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if name not in OPERATIONS or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        count = self.counts.get(name, 0)
        self.counts[name] = count + 1
        site = f"{layer}{AFTER}{name}" + (f"#{count}" if count else "")
        replaced = self.hook(site, module, output) if self.sites is None or site in self.sites else None
        return output if replaced is None else replaced
