"""A run's snapshots compared with its first and its last one, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.progress import Progress, quiet
from lightning_interp.similarity.gram import CONSTANT_ROUNDING
from lightning_interp.similarity.matrix import AnyMeasure, matrix, similarity
from lightning_interp.similarity.representation import Representation
from lightning_interp.similarity.results import Caution, Reliability, SimilarityMap, Snapshot
from lightning_interp.similarity.significance import chance, chance_in_closed_form, standard_error

MOST_LAYERS_LISTED = 6  # in a longer list the reason is hard to find; the number of layers stands in its place
LEAST_CHANGE = 0.01  # a smaller change in the denominator would show noise as progress
Failed = dict[str, Exception]


class History(NamedTuple):
    """One measure over a run.

    Args:
        to_initial: layer × snapshot, each compared with the first.
        to_final: layer × snapshot, each compared with the last.
        normalised: (s − s₀) / (s₁ − s₀) of `to_final`, s₀ and s₁ its first and last value: the share of the way to its
            final state that each layer has gone, 0 at the first snapshot and 1 at the last.
    """

    to_initial: SimilarityMap
    to_final: SimilarityMap
    normalised: SimilarityMap


@contextmanager
def isolated(name: str, failed: Failed | None) -> Iterator[None]:
    """Note an error under a measure's name, so that the others are still compared; raise it where `failed` is None."""
    try:
        yield
    except Exception as error:
        if failed is None:
            raise
        failed[name] = error


def histories(
    measures: Mapping[str, AnyMeasure],
    snapshots: Sequence[Snapshot],
    progress: Progress = quiet,
    failed: Failed | None = None,
) -> dict[str, History]:
    """Compare every snapshot with the first and the last, by every measure.

    Layer by layer, so that no more than three representations of a stored history are in memory.

    Args:
        measures: tag → measure.
        snapshots: all of them in order of time.
        progress: shows how far the comparison is.
        failed: measures that are left out; one that fails is added to them, with its error. When None it raises.
    """
    initial, final = snapshots[0], snapshots[-1]
    layers = list(final.layers)
    values = {name: torch.full((2, len(layers), len(snapshots)), torch.nan, dtype=torch.float64) for name in measures}
    for row, layer in enumerate(progress(layers, len(layers), "comparing representations")):
        first, last = initial.layers[layer], final.layers[layer]
        for column, snapshot in enumerate(snapshots):
            then = {initial.step: first, final.step: last}.get(snapshot.step) or snapshot.layers[layer]
            for name in _measures_left(measures, failed):
                with isolated(name, failed):
                    values[name][0, row, column] = similarity(measures[name], first, then)
                    values[name][1, row, column] = similarity(measures[name], then, last)
    working = _measures_left(measures, failed)
    return {name: _history(name, measures[name], snapshots, *values[name]) for name in working}


def layerwise(
    measures: Mapping[str, AnyMeasure], a: Snapshot, b: Snapshot, failed: Failed | None = None
) -> dict[str, dict[str, float]]:
    """Compare each layer in one snapshot with the same layer in another: measure → layer → similarity.

    A measure in `failed` is left out, and one that fails is added to them; when None it raises.
    """
    values: dict[str, dict[str, float]] = {name: {} for name in measures}
    for layer in b.layers:
        # Copies, so that what the measures derive from a layer is freed with it.
        x, y = replace(a.layers[layer]), replace(b.layers[layer])
        for name in _measures_left(measures, failed):
            with isolated(name, failed):
                values[name][layer] = float(similarity(measures[name], x, y))
    return {name: values[name] for name in _measures_left(measures, failed)}


def layer_by_layer(name: str, measure: AnyMeasure, then: Snapshot, final: Snapshot) -> SimilarityMap:
    """Compare all layers of one snapshot with all layers of the last."""
    rows, columns = dict(then.layers), dict(final.layers)
    at_end = then.step == final.step
    xs, ys = (columns, None) if at_end else (rows, list(columns.values()))
    values = matrix(measure, list(xs.values()), ys)
    when = f"epoch {then.epoch} (step {then.step})"
    title = "layers of the final network" if at_end else f"layers at {when} and at the end"
    snapshots = [] if at_end else [replace(then, layers=rows)]
    return SimilarityMap(
        name,
        title,
        tuple(rows),
        tuple(columns),
        values,
        "layer" if at_end else f"layer at {when}",
        "layer" if at_end else "layer at the end",
        next(iter(columns.values())).n,
        cautions(measure, *snapshots, replace(final, layers=columns)),
        is_distance(measure),
        own_scale=is_own_scale(measure),
    )


def with_reliability(table: SimilarityMap, measure: AnyMeasure, a: Snapshot, b: Snapshot) -> SimilarityMap:
    """Return the map of two snapshots' layers with what each value would be by chance, and its standard error.

    Where a measure has no `chance` of its own, permutations give it, for layers of the same name alone: several values
    for every pair would take too long. Both are NaN where a sample has several rows, which are not independent.
    """
    rows, columns = dict(a.layers), dict(b.layers)
    chances = torch.full_like(table.values, torch.nan)
    errors = chances.clone()
    for i, (row, x) in enumerate(rows.items()):
        for j, (column, y) in enumerate(columns.items()):
            if x.n == y.n == table.n:
                errors[i, j] = standard_error(measure, x, y)
                value = chance(measure, x, y) if row == column else chance_in_closed_form(measure, x, y)
                chances[i, j] = torch.nan if value is None else value
    return replace(table, chance=chances, standard_error=errors)


def reliability_by_layer(measure: AnyMeasure, a: Snapshot, b: Snapshot, n: int) -> dict[str, Reliability]:
    """Return how far to trust each layer's similarity between two snapshots of the same `n` samples."""
    by_layer, nan = {}, float("nan")
    for layer in b.layers:
        x, y = a.layers[layer], b.layers[layer]
        value = float(similarity(measure, x, y))
        by_chance, error = (chance(measure, x, y), standard_error(measure, x, y)) if x.n == y.n == n else (nan, nan)
        constant = _constant(x, "at the start") or _constant(y, "at the end")
        caution = constant or _caution_of(measure, y) or _caution_of(measure, x)
        by_layer[layer] = Reliability(value, by_chance, error, caution)
    return by_layer


def normalised(values: Float[Tensor, "layer snapshot"]) -> Float[Tensor, "layer snapshot"]:
    """Return (s − s₀) / (s₁ − s₀), s₀ and s₁ each row's first and last value: 0 at the start, 1 at the end.

    s₁ is 1 for a similarity to the end. NaN where |s₁ − s₀| is below 0.01: a layer that does not change has no share.
    """
    start, end = values[:, :1], values[:, -1:]
    unchanged = (end - start).abs() < LEAST_CHANGE
    return torch.where(unchanged, torch.nan, (values - start) / torch.where(unchanged, 1.0, end - start))


def cautions(measure: AnyMeasure, *snapshots: Snapshot) -> str:
    """Return the reasons for caution with a measure, each with the layers it concerns; empty where there are none."""
    details_by_reason: dict[str, dict[str, list[str]]] = {}
    for snapshot in snapshots:
        for layer in snapshot.layers:
            x = snapshot.layers[layer]  # one at a time: a stored snapshot reads it from its file
            if warning := _constant(x, f"at epoch {snapshot.epoch}") or _caution_of(measure, x):
                details = details_by_reason.setdefault(warning.reason, {}).setdefault(layer, [])
                details += [warning.detail] if warning.detail not in details else []
    total = len({layer for snapshot in snapshots for layer in snapshot.layers})
    return "; ".join(f"{_list_layers(layers, total)}: {reason}" for reason, layers in details_by_reason.items())


def by_chance(values: Sequence[float], digits: int = 2) -> str:
    """Return the range of layers' values by chance, and of how many it is known if not of all; empty where of none."""
    chances = sorted(value for value in values if value == value)
    if not chances:
        return ""
    low, high = f"{chances[0]:.{digits}f}", f"{chances[-1]:.{digits}f}"
    of = "" if len(chances) == len(values) else f" (known for {len(chances)} of {len(values)} layers)"
    return (low if low == high else f"{low} to {high}") + of


def is_distance(measure: AnyMeasure) -> bool:
    """Say whether 0 means the same, as for an angle."""
    return bool(getattr(measure, "distance", False))


def is_own_scale(measure: AnyMeasure) -> bool:
    """Say whether a measure's values are on an unknown scale: those of a plain function are."""
    return not hasattr(measure, "between")


def _measures_left(measures: Mapping[str, AnyMeasure], failed: Failed | None) -> list[str]:
    return [name for name in measures if name not in (failed or {})]


def _constant(layer: Representation, when: str) -> Caution | None:
    values, rounding = layer.values, 0.0
    if layer.form == "features":
        rounding = CONSTANT_ROUNDING * torch.finfo(values.dtype).eps * float(values.abs().max())
        values = values - values[:1]
    if bool((values.abs() > rounding).any()):
        return None
    return Caution("the same for all samples, so that no similarity is defined", when)


def _caution_of(measure: AnyMeasure, layer: Representation) -> Caution | None:
    if not hasattr(measure, "between") and layer.features is None:
        return Caution('not defined without the neurons, which store="activations" keeps', f"d = {layer.width:,}")
    caution: Callable[[Representation], Caution | None] | None = getattr(measure, "caution", None)
    return None if caution is None else caution(layer)


def _list_layers(layers: Mapping[str, Sequence[str]], total: int) -> str:
    if len(layers) > MOST_LAYERS_LISTED:
        return f"{len(layers)} of {total} layers"
    return ", ".join(f"{layer} ({' and '.join(details)})" if details else layer for layer, details in layers.items())


def _history(
    name: str, measure: AnyMeasure, snapshots: Sequence[Snapshot], to_initial: Tensor, to_final: Tensor
) -> History:
    final = snapshots[-1]
    layers, (by, columns) = tuple(final.layers), _snapshot_names(snapshots)
    n, note = next(iter(final.layers.values())).n, cautions(measure, snapshots[0], final)

    def by_epoch(title: str, values: Tensor) -> SimilarityMap:
        distance, own = is_distance(measure), is_own_scale(measure)
        return SimilarityMap(name, title, layers, columns, values, "layer", by, n, note, distance, own_scale=own)

    share = normalised(to_final)
    undefined = to_final[:, [0, -1]].isnan().any(1)
    unchanged = {layer: () for layer, out in zip(layers, share[:, 0].isnan() & ~undefined, strict=True) if out}
    names = _list_layers(unchanged, len(layers))
    left_out = f"Left out, as they end where they began, within {LEAST_CHANGE:g}: {names}. "
    return History(
        by_epoch("to the initial state", to_initial),
        by_epoch("to the final state", to_final),
        replace(
            by_epoch("share of the way to the final state", share),
            note=(left_out if unchanged else "") + note,
            distance=False,
            own_scale=False,
            legend="0: as at the start, 1: at its end",
        ),
    )


def _snapshot_names(snapshots: Sequence[Snapshot]) -> tuple[str, tuple[str, ...]]:
    """Return the axis title of snapshots and each one's name: its epoch, with the step where an epoch has several."""
    epochs = [snapshot.epoch for snapshot in snapshots]
    if len(set(epochs)) == len(epochs):
        return "epoch (0: before training)", tuple(map(str, epochs))
    return "epoch · step", tuple(f"{snapshot.epoch} · {snapshot.step}" for snapshot in snapshots)
