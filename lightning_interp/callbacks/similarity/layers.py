"""Which layers `RepresentationSimilarity` looks at: those asked for, or a sensible choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_interp.callbacks.similarity.arguments import SIMILARITY
from lightning_interp.checks import ArgumentError
from lightning_interp.network.layers import default_layers, match_layers
from lightning_interp.similarity.activations import OUTPUT, Activations

ARGUMENT = f"{SIMILARITY}(layers=...)"


def check_names(module: nn.Module, patterns: Sequence[str]) -> None:
    """Raise where a name or pattern matches no submodule; "output" is the network's own."""
    match_layers(module, _of_submodules(patterns), ARGUMENT)


def chosen_layers(module: nn.Module, patterns: Sequence[str] | None, found: Activations, batch: Any) -> Activations:
    """Return what to watch of all that a forward called; say where the batch's mask does not fit it.

    Args:
        module: the network.
        patterns: names or glob patterns; a choice of its own when None.
        found: all that a forward called.
        batch: one that was run.

    Raises:
        ArgumentError: of a name or pattern, nothing was called.
        ValueError: nothing was called at all.
    """
    watched = found.of(_by_default(module, found) if patterns is None else _asked(module, patterns, found))
    if not watched.layouts:
        raise ValueError(f"{SIMILARITY}: {type(module).__name__}'s forward calls no layer to look at")
    if unmasked := watched.unmasked(batch):
        rank_zero_warn(
            f"{SIMILARITY}: task.mask tells of another number of tokens than {', '.join(unmasked)} have; all of theirs count"
        )
    return watched


def _by_default(module: nn.Module, found: Activations) -> list[str]:
    """Return the default layers, and the network itself where none of them gives what it does."""
    layers = default_layers(module, found.layouts)
    return layers if "" not in found.layouts or found.ends & set(layers) else [*layers, ""]


def _asked(module: nn.Module, patterns: Sequence[str], found: Activations) -> list[str]:
    """Return the called layers that names or patterns mean."""
    meant = {
        pattern: [""] if pattern == OUTPUT and "" in found.layouts else match_layers(module, [pattern], ARGUMENT)
        for pattern in patterns
    }
    if silent := [pattern for pattern, layers in meant.items() if not found.layouts.keys() & set(layers)]:
        raise ArgumentError(
            f"{ARGUMENT}: expected layers that forward calls and that give floats with one row per sample, got"
            f" {', '.join(silent)}"
        )
    return [layer for layers in meant.values() for layer in layers]


def _of_submodules(patterns: Sequence[str]) -> list[str]:
    return [pattern for pattern in patterns if pattern != OUTPUT]
