"""Layers by name: which there are, which a pattern matches, and which to take by default."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from torch import nn

from lightning_interp.checks import ArgumentError

MOST_DEFAULT_LAYERS = 24  # a heat map of all pairs still has room for their names
COMPILED_PART = "_orig_mod"


def plain_name(name: str) -> str:
    """Return a submodule's name without the wrapper's attribute that `torch.compile` adds to it.

    >>> plain_name("net._orig_mod.0"), plain_name("net._orig_mod")
    ('net.0', 'net')
    """
    return ".".join(step for step in name.split(".") if step != COMPILED_PART)


def layer_names(module: nn.Module) -> list[str]:
    """Return the names of all submodules, in the module's own order; for a compiled one, that of the module inside."""
    by_plain_name = {plain_name(name): name for name, _ in module.named_modules() if plain_name(name)}
    return list(by_plain_name.values())


def match_layers(module: nn.Module, patterns: Sequence[str], argument: str = "layers") -> list[str]:
    """Return the submodules that names or glob patterns match, in the module's own order.

    A layer inside a compiled one is found by its name before compilation, too.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> match_layers(net, ["[02]"])
    ['0', '2']

    Raises:
        ArgumentError: a name or pattern matches nothing; close names are suggested.
    """
    names = layer_names(module)
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            hint = _hint(pattern, list(map(plain_name, names)))
            raise ArgumentError(f"{argument}: {pattern!r} names no layer of {type(module).__name__}; {hint}")
    return [name for name in names if any(_matches(name, pattern) for pattern in patterns)]


def default_layers(module: nn.Module, called: Mapping[str, object]) -> list[str]:
    """Choose among the layers that a forward called: those with weights of their own, norms left out.

    A layer is a module with no called module inside; the weights of modules inside that were not called count as its
    own (an attention's projections).

    Args:
        module: the network.
        called: the names that were called, in call order.

    Returns:
        At most 24 names in call order, evenly thinned; the first and the last always stay.
    """
    leaves = [name for name in called if not any(_is_inside(inner, name) for inner in called)]
    weighted = [name for name in leaves if _has_weights(module.get_submodule(name))]
    names = weighted or leaves
    if len(names) <= MOST_DEFAULT_LAYERS:
        return names
    indices = np.linspace(0, len(names) - 1, MOST_DEFAULT_LAYERS).round().astype(int)
    return [names[index] for index in indices]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(plain_name(name), pattern) or fnmatchcase(name, pattern)


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


def _has_weights(module: nn.Module) -> bool:
    return "Norm" not in type(module).__name__ and any(True for _ in module.parameters())


def _hint(pattern: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(close)}?"
    ellipsis = ", …" if len(names) > 8 else ""
    return f"there are {', '.join(names[:8])}{ellipsis}"
