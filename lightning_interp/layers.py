"""Layers by name: which there are, which a pattern means, which to look at when nobody says."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from torch import nn

from lightning_interp.errors import ArgumentError

MOST_BY_DEFAULT = 24


def match_layers(module: nn.Module, patterns: Sequence[str], argument: str = "layers") -> list[str]:
    """Return the submodules that names or glob patterns mean, in the module's own order.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> match_layers(net, ["[02]"])
    ['0', '2']

    Raises:
        ArgumentError: a name or pattern matches nothing; close names are suggested.
    """
    names = [name for name, _ in module.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ArgumentError(
                f"{argument}: {pattern!r} names no layer of {type(module).__name__}; {_hint(pattern, names)}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def default_layers(module: nn.Module, called: Mapping[str, object]) -> list[str]:
    """Choose among the layers that a forward called: those with weights of their own, norms left out.

    Args:
        module: the network.
        called: the names that were called, in call order.

    Returns:
        At most 24 names in call order, evenly thinned; the first and the last always stay.
    """
    leaves = [name for name in called if _is_leaf(module.get_submodule(name))]
    weighted = [name for name in leaves if _has_weights(module.get_submodule(name))]
    names = weighted or leaves
    if len(names) <= MOST_BY_DEFAULT:
        return names
    places = np.linspace(0, len(names) - 1, MOST_BY_DEFAULT).round().astype(int)
    return [names[place] for place in places]


def _is_leaf(part: nn.Module) -> bool:
    return next(part.children(), None) is None


def _has_weights(part: nn.Module) -> bool:
    return "Norm" not in type(part).__name__ and any(True for _ in part.parameters(recurse=False))


def _hint(pattern: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    shown = close or list(names[:8])
    more = "" if close or len(names) <= 8 else ", …"
    return f"{'did you mean' if close else 'there are'} {', '.join(shown)}{more}{'?' if close else ''}"
