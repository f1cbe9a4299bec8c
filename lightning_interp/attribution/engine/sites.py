"""Places in a forward to look at: what layers give, and what a function makes of it after them."""

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
    """Call `hook(site, part, tensor)` for the first tensor that each layer gives, and for what functions make of it.

    A site is a layer's name, or `layer>function`: the activation, pooling or sum that a forward computes by a function
    or method after that layer was the last to finish (`layer>function#1` the second such). What the hook returns,
    unless None, replaces the tensor.

    Args:
        model: the network.
        hook: gets the site's name, the layer, and the tensor.
        sites: which to watch; all when None.
    """
    functions = _Functions(model, hook, sites)

    def finished(layer: str, part: nn.Module, _: Any, output: Any) -> Any:
        functions.after(layer, part)
        if not (sites is None or layer in sites):
            return None
        with torch._C.DisableTorchFunction():  # what hooks do is no part of the forward, and costs less unseen
            given = next(tensors(output), None)
            replaced = hook(layer, part, given) if given is not None and given.is_floating_point() else None
            return None if replaced is None else map_tensors(lambda t: replaced if t is given else t, output)

    with hooked(model, [name for name, _ in model.named_modules() if name], finished), functions:
        yield


class _Functions(TorchFunctionMode):
    def __init__(self, model: nn.Module, hook: Hook, sites: Sequence[str] | None) -> None:
        super().__init__()
        self.hook, self.sites = hook, sites
        self.after("", model)

    def after(self, layer: str, part: nn.Module) -> None:
        """Note the layer that finished last."""
        self.layer, self.part, self.counts = layer, part, dict[str, int]()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        layer, part = self.layer, self.part
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if name not in OPERATIONS or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        count = self.counts.get(name, 0)
        self.counts[name] = count + 1
        site = f"{layer}{AFTER}{name}" + (f"#{count}" if count else "")
        replaced = self.hook(site, part, output) if self.sites is None or site in self.sites else None
        return output if replaced is None else replaced
