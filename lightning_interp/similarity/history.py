"""A run's snapshots compared with its first and its last one, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.progress import Progress, quiet
from lightning_interp.records import Caution, Doubt, SimilarityMap, Snapshot
from lightning_interp.representation import Representation
from lightning_interp.similarity.matrix import AnyMeasure, matrix, similarity
from lightning_interp.similarity.null import chance, is_exact, standard_error

MOST_NAMED = 6
STILL = 0.01


class History(NamedTuple):
    """One measure over a run.

    Args:
        to_initial: layer × snapshot, each compared with the first.
        to_final: layer × snapshot, each compared with the last.
        normalised: (s − s₀) / (1 − s₀) of `to_final`, s₀ its value before training: how much of the way to its end
            each layer has gone, 0 at the first snapshot and 1 at the last.
    """

    to_initial: SimilarityMap
    to_final: SimilarityMap
    normalised: SimilarityMap


def histories(
    measures: Mapping[str, AnyMeasure],
    snapshots: Sequence[Snapshot],
    progress: Progress = quiet,
) -> dict[str, History]:
    """Compare every snapshot with the first and the last, by every measure.

    Layer by layer, so that of a stored history no more than three representations are in memory.

    Args:
        measures: tag → measure.
        snapshots: all of them in order of time.
        progress: shows how far it is.
    """
    initial, final = snapshots[0], snapshots[-1]
    layers = list(final.layers)
    found = {name: torch.full((2, len(layers), len(snapshots)), torch.nan, dtype=torch.float64) for name in measures}
    for row, layer in enumerate(progress(layers, len(layers), "comparing representations")):
        first, last = initial.layers[layer], final.layers[layer]
        for column, snapshot in enumerate(snapshots):
            then = {initial.step: first, final.step: last}.get(snapshot.step) or snapshot.layers[layer]
            for name, measure in measures.items():
                found[name][0, row, column] = similarity(measure, first, then)
                found[name][1, row, column] = similarity(measure, then, last)
    return {name: _history(name, measures[name], snapshots, *values) for name, values in found.items()}


def layerwise(measures: Mapping[str, AnyMeasure], a: Snapshot, b: Snapshot) -> dict[str, dict[str, float]]:
    """Compare each layer in one snapshot with the same layer in another: measure → layer → similarity."""
    found: dict[str, dict[str, float]] = {name: {} for name in measures}
    for layer in b.layers:
        x, y = replace(a.layers[layer]), replace(b.layers[layer])  # what they derive is given up with them
        for name, measure in measures.items():
            found[name][layer] = float(similarity(measure, x, y))
    return found


def layer_by_layer(name: str, measure: AnyMeasure, then: Snapshot, final: Snapshot) -> SimilarityMap:
    """Compare all layers of one snapshot with all layers of the last."""
    rows, columns = dict(then.layers), dict(final.layers)
    same = then.step == final.step
    values = matrix(measure, list(columns.values() if same else rows.values()), None if same else [*columns.values()])
    title = "layers of the final network" if same else f"layers at epoch {then.epoch} and at the end"
    row_title = "layer" if same else f"layer at epoch {then.epoch}"
    return SimilarityMap(
        name,
        title,
        tuple(rows),
        tuple(columns),
        values,
        row_title,
        "layer" if same else "layer at the end",
        next(iter(columns.values())).n,
        cautions(measure, final),
        is_distance(measure),
    )


def with_doubt(table: SimilarityMap, measure: AnyMeasure, a: Snapshot, b: Snapshot) -> SimilarityMap:
    """Return the map of two snapshots' layers with what each value would be by chance, and its standard error.

    Where chance is known only from permutations, it is worked out for layers of the same name alone. Rows that are
    several to a sample are not independent of each other: both are NaN.
    """
    rows, columns = dict(a.layers), dict(b.layers)
    chances = torch.full_like(table.values, torch.nan)
    errors = chances.clone()
    for i, (row, x) in enumerate(rows.items()):
        for j, (column, y) in enumerate(columns.items()):
            if x.n == y.n == table.n:
                errors[i, j] = standard_error(measure, x, y)
                chances[i, j] = chance(measure, x, y) if row == column or is_exact(measure) else torch.nan
    return replace(table, chance=chances, standard_error=errors)


def doubts(measure: AnyMeasure, a: Snapshot, b: Snapshot, n: int) -> dict[str, Doubt]:
    """Return how far to trust each layer's similarity between two snapshots of the same `n` samples."""
    found, nan = {}, float("nan")
    for layer in b.layers:
        x, y = a.layers[layer], b.layers[layer]
        value = float(similarity(measure, x, y))
        by_chance, error = (chance(measure, x, y), standard_error(measure, x, y)) if x.n == y.n == n else (nan, nan)
        found[layer] = Doubt(value, by_chance, error, _caution(measure, y))
    return found


def normalised(values: Float[Tensor, "layer snapshot"]) -> Float[Tensor, "layer snapshot"]:
    """Return (s − s₀) / (s₁ − s₀), s₀ and s₁ each row's first and last value: 0 at the start, 1 at the end.

    s₁ is 1 for a similarity to the end. NaN where s₁ − s₀ is below 0.01: of a layer that goes no way there is no share.
    """
    start, end = values[:, :1], values[:, -1:]
    still = (end - start).abs() < STILL
    return torch.where(still, torch.nan, (values - start) / torch.where(still, 1.0, end - start))


def cautions(measure: AnyMeasure, snapshot: Snapshot) -> str:
    """Return when not to trust a measure, with the layers it concerns; empty where nothing is known."""
    found: dict[str, list[str]] = {}
    for layer in snapshot.layers:
        if warning := _caution(measure, snapshot.layers[layer]):
            found.setdefault(warning.reason, []).append(f"{layer} ({warning.detail})")
    return "; ".join(f"{_named(layers, snapshot)}: {reason}" for reason, layers in found.items())


def is_distance(measure: AnyMeasure) -> bool:
    """Say whether 0 means the same, as for an angle."""
    return bool(getattr(measure, "distance", False))


def _caution(measure: AnyMeasure, layer: Representation) -> Caution | None:
    if not hasattr(measure, "between") and layer.features is None:
        return Caution('not defined without the neurons, which store="activations" keeps', f"d = {layer.width:,}")
    say: Callable[[Representation], Caution | None] | None = getattr(measure, "caution", None)
    return None if say is None else say(layer)


def _named(layers: Sequence[str], snapshot: Snapshot) -> str:
    return ", ".join(layers) if len(layers) <= MOST_NAMED else f"{len(layers)} of {len(snapshot.layers)} layers"


def _history(
    name: str, measure: AnyMeasure, snapshots: Sequence[Snapshot], to_initial: Tensor, to_final: Tensor
) -> History:
    final = snapshots[-1]
    layers, (by, columns) = tuple(final.layers), _moments(snapshots)
    n, note, distance = next(iter(final.layers.values())).n, cautions(measure, final), is_distance(measure)

    def by_epoch(title: str, values: Tensor, distance: bool) -> SimilarityMap:
        return SimilarityMap(name, title, layers, columns, values, "layer", by, n, note, distance)

    way = normalised(to_final)
    return History(
        by_epoch("to the initial state", to_initial, distance),
        by_epoch("to the final state", to_final, distance),
        replace(
            by_epoch("share of the way to the final state", way, distance=False),
            note=f"Left out: layers that end where they began, within {STILL:g}. {note}",
            legend="0: as at the start, 1: at its end",
        ),
    )


def _moments(snapshots: Sequence[Snapshot]) -> tuple[str, tuple[str, ...]]:
    """Return what snapshots are named by, and each one's name: its epoch, and the step where an epoch has several."""
    epochs = [snapshot.epoch for snapshot in snapshots]
    if len(set(epochs)) == len(epochs):
        return "epoch (0: before training)", tuple(map(str, epochs))
    return "epoch · step", tuple(f"{snapshot.epoch} · {snapshot.step}" for snapshot in snapshots)
