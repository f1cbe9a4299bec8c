"""What is said of a run's representations when training is over: curves, maps and doubts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lightning_interp import figures, report
from lightning_interp.board import Board, clean
from lightning_interp.callbacks.showing import write_section
from lightning_interp.progress import Progress
from lightning_interp.records import Doubt, SimilarityMap, Snapshot
from lightning_interp.similarity.history import History, cautions, doubts, histories, layer_by_layer
from lightning_interp.similarity.matrix import AnyMeasure
from lightning_interp.storage import Folder, SnapshotStore

EARLIER_FRAMES = 3


def tell(
    measures: Mapping[str, AnyMeasure],
    store: SnapshotStore,
    folder: Folder,
    room: str,
    board: Board,
    notes: Sequence[str],
    progress: Progress,
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
    """
    snapshots = [store.read(step) for step in store.steps]
    final, n = snapshots[-1], int(store.manifest["probe"]["n"])
    compared = histories(measures, snapshots, progress)
    drawn: dict[str, dict[str, bytes]] = {}
    tables: dict[str, list[list[str]]] = {}
    for name, history in compared.items():
        _curves(board, name, store.steps, history)
        found = doubts(measures[name], snapshots[0], final, n)
        drawn[name] = {
            file: _draw(board, folder.folder(room), where, step, file, _noted(table, n, found))
            for where, step, file, table in _maps(name, measures[name], snapshots, history)
        }
        tables[name] = doubt_table(found)
        board.text(f"similarity_doubt/{clean(name)}", _markdown(tables[name]), final.step)
    said = [*notes, "1 means the same up to the measure's invariance, 0 unrelated."]
    said += [f"{name}: {why}." for name, measure in measures.items() if (why := cautions(measure, final))]
    board.text(f"{room.replace('similarity', 'similarity_notes/probe')}", "\n\n".join(said), final.step)
    write_section(folder, room, report.similarity_section(drawn, tables, said))


def doubt_table(found: Mapping[str, Doubt]) -> list[list[str]]:
    """Return each layer's similarity and how far to trust it as rows of text, a heading first."""
    heading = ["layer", "similarity of start and end", "by chance", "standard error", "caution"]
    return [heading] + [
        [layer, *(_number(x) for x in (d.value, d.chance, d.standard_error)), _said(d)] for layer, d in found.items()
    ]


def _noted(table: SimilarityMap, n: int, found: Mapping[str, Doubt]) -> SimilarityMap:
    """Return the map with the number of samples, and what its values would be by chance."""
    known = [doubt.chance for doubt in found.values() if doubt.chance == doubt.chance]
    if not known or table.legend:
        return replace(table, n=n)
    low, high = f"{min(known):.2f}", f"{max(known):.2f}"
    said = f"By chance a layer's start and end score {low if low == high else f'{low} to {high}'}. {table.note}"
    return replace(table, n=n, note=said)


def _said(doubt: Doubt) -> str:
    return "" if doubt.caution is None else f"{doubt.caution.reason} ({doubt.caution.detail})"


def _number(value: float) -> str:
    return f"{value:.3f}" if value == value else "–"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    heading, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([heading, "|---" * len(rows[0]) + "|", *others])


def _curves(board: Board, name: str, steps: Sequence[int], history: History) -> None:
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


def _draw(board: Board, folder: Folder, where: str, step: int, file: str, table: SimilarityMap) -> bytes:
    pixels = figures.heat_map(table)
    board.image(f"similarity_maps/{where}", pixels, step)
    drawn = figures.png(pixels)
    folder.write(f"{clean(table.measure)}-{file}.png", drawn)
    return drawn
