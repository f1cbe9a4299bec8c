"""What is said of a run's representations when training is over: curves, maps and doubts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lightning_interp.callbacks.loggers import Loggers
from lightning_interp.callbacks.publish import write_section
from lightning_interp.checks import clean, markdown
from lightning_interp.progress import Progress
from lightning_interp.similarity.history import (
    Failed,
    History,
    by_chance,
    cautions,
    histories,
    is_distance,
    is_own_scale,
    isolated,
    layer_by_layer,
    reliability_by_layer,
)
from lightning_interp.similarity.matrix import AnyMeasure
from lightning_interp.similarity.results import Reliability, SimilarityMap, Snapshot
from lightning_interp.storage.folder import Folder
from lightning_interp.storage.snapshots import SnapshotStore
from lightning_interp.views import report
from lightning_interp.views.canvas import png
from lightning_interp.views.heat_map import heat_map

EARLIER_FRAMES = 3


def report_similarity(
    measures: Mapping[str, AnyMeasure],
    store: SnapshotStore,
    folder: Folder,
    room: str,
    board: Loggers,
    notes: Sequence[str],
    progress: Progress,
    failed: Failed | None = None,
) -> None:
    """Compare all stored snapshots, and bring what comes out to the board, their folder and the report.

    Args:
        measures: tag → measure.
        store: the run's snapshots.
        folder: the run's.
        room: the snapshots' folder in the run's.
        board: its loggers.
        notes: what to say first of the samples and layers.
        progress: shows how far it is.
        failed: measures that are left out; one that fails is added to them, with its error. When None it raises.
    """
    snapshots = [store.read(step) for step in store.steps]
    first, final, n = snapshots[0], snapshots[-1], int(store.manifest["probe"]["n"])
    compared = histories(measures, snapshots, progress, failed)
    drawn: dict[str, dict[str, bytes]] = {}
    tables: dict[str, list[list[str]]] = {}
    doubted: dict[str, str] = {}
    for name, history in compared.items():
        with isolated(name, failed):
            found = reliability_by_layer(measures[name], first, final, n)
            maps = _maps(name, measures[name], snapshots, history)
            doubted[name] = cautions(measures[name], first, final)
            _curves(board, name, store.steps, history)
            drawn[name] = {
                file: _draw(board, folder.folder(room), where, step, file, _noted(table, n, found))
                for where, step, file, table in maps
            }
            tables[name] = reliability_table(found, is_distance(measures[name]))
            board.text(f"similarity_doubt/{clean(name)}", markdown(tables[name]), final.step)
    told = {name: measures[name] for name in tables}
    said = [*notes, *meanings(told), *(f"{name}: {doubted[name]}." for name in told if doubted[name])]
    said += [f"{name} failed, and is left out: {error}" for name, error in (failed or {}).items()]
    board.text(f"{room.replace('similarity', 'similarity_notes/probe')}", "\n\n".join(said), final.step)
    write_section(folder, room, report.similarity_section({name: drawn[name] for name in told}, tables, said))


def meanings(measures: Mapping[str, AnyMeasure]) -> list[str]:
    """Return in words what the measures' values mean, those alike together."""
    meaning: dict[str, list[str]] = {}
    for name, measure in measures.items():
        words = "1 means the same up to the measure's invariance, 0 unrelated"
        if is_own_scale(measure):
            words = "values are on the function's own scale"
        elif is_distance(measure):
            words = "a distance, 0 means the same up to the measure's invariance"
        meaning.setdefault(words, []).append(name)
    return [f"{', '.join(names)}: {words}." for words, names in meaning.items()]


def reliability_table(found: Mapping[str, Reliability], distance: bool = False) -> list[list[str]]:
    """Return each layer's similarity and how far to trust it as rows of text, a heading first."""
    what = "distance" if distance else "similarity"
    heading = ["layer", f"{what} of start and end", "by chance", "standard error", "caution"]
    return [heading] + [
        [layer, *(_number(x) for x in (d.value, d.chance, d.standard_error)), _said(d)] for layer, d in found.items()
    ]


def _noted(table: SimilarityMap, n: int, found: Mapping[str, Reliability]) -> SimilarityMap:
    """Return the map with the number of samples, and what its values would be by chance."""
    chances = by_chance([doubt.chance for doubt in found.values()])
    if not chances or table.legend:
        return replace(table, n=n)
    return replace(table, n=n, note=f"By chance a layer's start and end score {chances}. {table.note}")


def _said(doubt: Reliability) -> str:
    return "" if doubt.caution is None else f"{doubt.caution.reason} ({doubt.caution.detail})"


def _number(value: float) -> str:
    return f"{value:.3f}" if value == value else "–"


def _curves(board: Loggers, name: str, steps: Sequence[int], history: History) -> None:
    for kind, table in (("to_final", history.to_final), ("to_final_normalised", history.normalised)):
        for layer, values in zip(table.rows, table.values.tolist(), strict=True):
            board.history(f"similarity_{kind}/{name}/{layer}", steps, values)


def _maps(
    name: str, measure: AnyMeasure, snapshots: Sequence[Snapshot], history: History
) -> list[tuple[str, int, str, SimilarityMap]]:
    """Return the maps of a measure as (where on the board, step, file, map)."""
    final = snapshots[-1]
    by_epoch = {
        "layer_by_epoch_to_initial": history.to_initial,
        "layer_by_epoch_to_final": history.to_final,
        "layer_by_epoch_to_final_normalised": history.normalised,
        "layer_by_layer": layer_by_layer(name, measure, final, final),
    }
    maps = [(f"{name}/{kind}", final.step, kind, table) for kind, table in by_epoch.items()]
    for then in _frames(snapshots):
        kind = "layer_by_layer_to_final"
        table = layer_by_layer(name, measure, then, final)
        maps.append((f"{name}/{kind}", then.step, f"{kind}-{then.step:09d}", table))
    return maps


def _frames(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Return up to three snapshots before the last: the first, and two evenly spread."""
    places = np.linspace(0, len(snapshots) - 1, EARLIER_FRAMES + 1).round().astype(int)
    return [snapshots[place] for place in sorted(set(places.tolist())) if place < len(snapshots) - 1]


def _draw(board: Loggers, folder: Folder, where: str, step: int, file: str, table: SimilarityMap) -> bytes:
    pixels = heat_map(table)
    board.image(f"similarity_maps/{where}", pixels, step)
    drawn = png(pixels)
    folder.write(f"{clean(table.measure)}-{file}.png", drawn)
    return drawn
