"""Which layers `RepresentationSimilarity` records: those requested, or a default choice."""

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


def chosen_layers(module: nn.Module, patterns: Sequence[str] | None, called: Activations, batch: Any) -> Activations:
    """Return which activations to record of all that a forward gives; warn where the batch's mask does not fit them.

    Args:
        module: the network.
        patterns: names or glob patterns; a choice of its own when None.
        called: all layers that a forward calls.
        batch: one that was run.

    Raises:
        ArgumentError: of a name or pattern, nothing was called.
        ValueError: nothing was called at all.
    """
    layers = _layers_by_default(module, called) if patterns is None else _matched_layers(module, patterns, called)
    activations = called.of(layers)
    if not activations.layouts:
        raise ValueError(
            f"{SIMILARITY}: {type(module).__name__}'s forward calls no layer whose activations could be recorded"
        )
    if unmasked := activations.unmasked(batch):
        rank_zero_warn(
            f"{SIMILARITY}: task.mask is of another number of tokens than {', '.join(unmasked)} have; all of"
            " theirs count"
        )
    return activations


def _layers_by_default(module: nn.Module, called: Activations) -> list[str]:
    """Return the default layers, and the network itself where none of them gives what it does."""
    layers = default_layers(module, called.layouts)
    return layers if "" not in called.layouts or called.ends & set(layers) else [*layers, ""]


def _matched_layers(module: nn.Module, patterns: Sequence[str], called: Activations) -> list[str]:
    """Return the called layers that names or patterns mean."""
    matches = {
        pattern: [""] if pattern == OUTPUT and "" in called.layouts else match_layers(module, [pattern], ARGUMENT)
        for pattern in patterns
    }
    if uncalled := [pattern for pattern, layers in matches.items() if not called.layouts.keys() & set(layers)]:
        raise ArgumentError(
            f"{ARGUMENT}: expected layers that forward calls and that give floats with one row per sample, got"
            f" {', '.join(uncalled)}"
        )
    return [layer for layers in matches.values() for layer in layers]


def _of_submodules(patterns: Sequence[str]) -> list[str]:
    return [pattern for pattern in patterns if pattern != OUTPUT]
