"""A run's snapshots compared with its first and its last one, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from lightning_interp.records import Caution, Representation, SimilarityMap, Snapshot
from lightning_interp.similarity.matrix import Measure, matrix

MOST_NAMED = 6


class History(NamedTuple):
    """One measure over a run.

    Args:
        to_initial: layer × snapshot, each compared with the first.
        to_final: layer × snapshot, each compared with the last.
        layers: layer × layer of the last.
    """

    to_initial: SimilarityMap
    to_final: SimilarityMap
    layers: SimilarityMap


def histories(
    measures: dict[str, Measure], initial: Snapshot, final: Snapshot, snapshots: Iterable[Snapshot]
) -> dict[str, History]:
    """Compare every snapshot with the first and the last, by every measure.

    Args:
        measures: tag → measure.
        initial: the first snapshot.
        final: the last snapshot.
        snapshots: all of them in order of time; read once, one at a time.
    """
    rows: dict[str, tuple[list[list[float]], list[list[float]]]] = {name: ([], []) for name in measures}
    epochs = []
    for then in snapshots:
        epochs.append(str(then.epoch))
        for name, measure in measures.items():
            rows[name][0].append(layerwise(measure, initial, then))
            rows[name][1].append(layerwise(measure, then, final))
    return {name: _history(name, measure, final, epochs, *rows[name]) for name, measure in measures.items()}


def layerwise(measure: Measure, a: Snapshot, b: Snapshot) -> list[float]:
    """Compare each layer in one snapshot with the same layer in another."""
    return [float(measure.between(a.layers[layer].double(), b.layers[layer].double())) for layer in b.layers]


def cautions(measure: Measure, snapshot: Snapshot) -> str:
    """Return when not to trust a measure, with the layers it concerns; empty where nothing is known."""
    say: Callable[[Representation], Caution | None] | None = getattr(measure, "caution", None)
    if say is None:
        return ""
    found: dict[str, list[str]] = {}
    for layer, representation in snapshot.layers.items():
        if warning := say(representation):
            found.setdefault(warning.reason, []).append(f"{layer} ({warning.detail})")
    return "; ".join(f"{_named(layers, snapshot)}: {reason}" for reason, layers in found.items())


def _named(layers: Sequence[str], snapshot: Snapshot) -> str:
    return ", ".join(layers) if len(layers) <= MOST_NAMED else f"{len(layers)} of {len(snapshot.layers)} layers"


def _history(
    name: str,
    measure: Measure,
    final: Snapshot,
    epochs: Sequence[str],
    to_initial: list[list[float]],
    to_final: list[list[float]],
) -> History:
    layers, columns, note = tuple(final.layers), tuple(epochs), cautions(measure, final)
    n, distance = next(iter(final.layers.values())).n, bool(getattr(measure, "angle", False))

    def by_epoch(title: str, values: list[list[float]]) -> SimilarityMap:
        table = torch.tensor(values, dtype=torch.float64).T
        return SimilarityMap(
            name, title, layers, columns, table, "layer", "epoch (0: before training)", n, note, distance
        )

    pairs = matrix(measure, list(final.layers.values()))
    return History(
        by_epoch("to the initial state", to_initial),
        by_epoch("to the final state", to_final),
        SimilarityMap(name, "layers of the final network", layers, layers, pairs, "layer", "layer", n, note, distance),
    )
