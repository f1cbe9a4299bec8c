"""Layers by name: which there are, which a pattern means, which to look at when nobody says."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from torch import nn

from lightning_interp.checks import ArgumentError

MOST_DEFAULT_LAYERS = 24
COMPILED_PART = "_orig_mod"


def plain_name(name: str) -> str:
    """Return a submodule's name without what `torch.compile` puts into it.

    >>> plain_name("net._orig_mod.0"), plain_name("net._orig_mod")
    ('net.0', 'net')
    """
    return ".".join(part for part in name.split(".") if part != COMPILED_PART)


def layer_names(module: nn.Module) -> list[str]:
    """Return the names of all submodules, in the module's own order; of a compiled one, that of what it compiled."""
    named = {plain_name(name): name for name, _ in module.named_modules() if plain_name(name)}
    return list(named.values())


def match_layers(module: nn.Module, patterns: Sequence[str], argument: str = "layers") -> list[str]:
    """Return the submodules that names or glob patterns mean, in the module's own order.

    A layer inside a compiled one goes by its name before it was compiled, too.

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

    A layer is a module inside which none was called; the weights of modules that were not are its own (an attention's
    projections).

    Args:
        module: the network.
        called: the names that were called, in call order.

    Returns:
        At most 24 names in call order, evenly thinned; the first and the last always stay.
    """
    leaves = [name for name in called if not any(_is_inside(other, name) for other in called)]
    weighted = [name for name in leaves if _has_weights(module.get_submodule(name))]
    names = weighted or leaves
    if len(names) <= MOST_DEFAULT_LAYERS:
        return names
    places = np.linspace(0, len(names) - 1, MOST_DEFAULT_LAYERS).round().astype(int)
    return [names[place] for place in places]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(plain_name(name), pattern) or fnmatchcase(name, pattern)


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


def _has_weights(part: nn.Module) -> bool:
    return "Norm" not in type(part).__name__ and any(True for _ in part.parameters())


def _hint(pattern: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    shown = close or list(names[:8])
    more = "" if close or len(names) <= 8 else ", …"
    return f"{'did you mean' if close else 'there are'} {', '.join(shown)}{more}{'?' if close else ''}"
