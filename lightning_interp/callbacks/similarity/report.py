"""What is reported of a run's representations when training is over: curves, maps, and how far to trust them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lightning_interp.callbacks.publish import Curve, Findings
from lightning_interp.checks import clean
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
from lightning_interp.storage.snapshots import SnapshotStore
from lightning_interp.views.heat_map import heat_map
from lightning_interp.views.report import Block, Fold, Heading, Paragraph, Picture, Pictures, Section, Table
from lightning_interp.views.tables import as_markdown

SIMILARITY_TITLE = "How the layers changed"
# The first snapshot and two between it and the last show a network's course; each is a map of all pairs of layers.
EARLIER_MAPS = 3


class MeasureFindings(NamedTuple):
    """What one measure has found over a run.

    Args:
        measure: the measure itself.
        curves: each layer's similarity to its end.
        pictures: its maps.
        reliability: rows of text, a heading first: how far to trust each layer's similarity.
        caution: when not to trust the measure, in words; empty where nothing is known.
    """

    measure: AnyMeasure
    curves: list[Curve]
    pictures: list[Picture]
    reliability: list[list[str]]
    caution: str


def similarity_findings(
    measures: Mapping[str, AnyMeasure],
    store: SnapshotStore,
    notes: Sequence[str],
    progress: Progress,
    failed: Failed | None = None,
) -> Findings:
    """Compare all stored snapshots with the first and the last.

    Args:
        measures: tag → measure.
        store: the run's snapshots.
        notes: on samples and layers, at the beginning.
        progress: shows how far it is.
        failed: measures that are left out; one that fails is added to them, with its error. When None it raises.
    """
    snapshots = [store.read(step) for step in store.steps]
    n = int(store.manifest["probe"]["n"])
    results: dict[str, MeasureFindings] = {}
    for name, history in histories(measures, snapshots, progress, failed).items():
        with isolated(name, failed):
            results[name] = _of_measure(name, measures[name], snapshots, history, n)
    used = {name: result.measure for name, result in results.items()}
    remarks = [
        *notes,
        *meanings(used),
        *(f"{name}: {result.caution}." for name, result in results.items() if result.caution),
    ]
    remarks += [f"{name} failed, and is left out: {error}" for name, error in (failed or {}).items()]
    texts = {f"similarity_doubt/{clean(name)}": as_markdown(result.reliability) for name, result in results.items()}
    blocks: list[Block] = [Paragraph(remark) for remark in remarks]
    for name, result in results.items():
        trust = Fold("How far to trust them", [Table(result.reliability)])
        pictures = [(picture.file, picture) for picture in result.pictures]
        blocks += [Heading(name), Pictures(pictures, "map"), trust]
    return Findings(
        step=snapshots[-1].step,
        section=Section(SIMILARITY_TITLE, blocks),
        curves=[curve for result in results.values() for curve in result.curves],
        pictures=[picture for result in results.values() for picture in result.pictures],
        texts={**texts, "similarity_notes/probe": "\n\n".join(remarks)},
    )


def _of_measure(
    name: str, measure: AnyMeasure, snapshots: Sequence[Snapshot], history: History, n: int
) -> MeasureFindings:
    reliability = reliability_by_layer(measure, snapshots[0], snapshots[-1], n)
    pictures = _similarity_pictures(name, measure, snapshots, history, n, reliability)
    for picture in pictures:
        _ = picture.png  # drawn here, so that a map that cannot be drawn takes no other measure with it
    table = reliability_table(reliability, is_distance(measure))
    caution = cautions(measure, snapshots[0], snapshots[-1])
    return MeasureFindings(
        measure, _curves_to_final(name, [s.step for s in snapshots], history), pictures, table, caution
    )


def meanings(measures: Mapping[str, AnyMeasure]) -> list[str]:
    """Return in words what the measures' values mean, those alike together."""
    names_by_meaning: dict[str, list[str]] = {}
    for name, measure in measures.items():
        meaning = "1 means the same up to the measure's invariance, 0 unrelated"
        if is_own_scale(measure):
            meaning = "values are on the function's own scale"
        elif is_distance(measure):
            meaning = "a distance, 0 means the same up to the measure's invariance"
        names_by_meaning.setdefault(meaning, []).append(name)
    return [f"{', '.join(names)}: {meaning}." for meaning, names in names_by_meaning.items()]


def reliability_table(by_layer: Mapping[str, Reliability], distance: bool = False) -> list[list[str]]:
    """Return each layer's similarity and how far to trust it as rows of text, a heading first."""
    quantity = "distance" if distance else "similarity"
    heading = ["layer", f"{quantity} of start and end", "by chance", "standard error", "caution"]
    return [heading] + [
        [layer, *(_three_digits(x) for x in (r.value, r.chance, r.standard_error)), _caution_in_words(r)]
        for layer, r in by_layer.items()
    ]


def _caution_in_words(reliability: Reliability) -> str:
    caution = reliability.caution
    return "" if caution is None else f"{caution.reason} ({caution.detail})"


def _three_digits(value: float) -> str:
    return f"{value:.3f}" if value == value else "–"


def _curves_to_final(name: str, steps: Sequence[int], history: History) -> list[Curve]:
    kinds = (("to_final", history.to_final), ("to_final_normalised", history.normalised))
    return [
        Curve(f"similarity_{kind}/{name}/{layer}", steps, values)
        for kind, table in kinds
        for layer, values in zip(table.rows, table.values.tolist(), strict=True)
    ]


def _similarity_pictures(
    name: str,
    measure: AnyMeasure,
    snapshots: Sequence[Snapshot],
    history: History,
    n: int,
    reliability: Mapping[str, Reliability],
) -> list[Picture]:
    """Return a measure's maps: layers by epoch, the final layers with each other, and earlier layers with the final."""
    final = snapshots[-1]
    maps = [
        ("layer_by_epoch_to_initial", final.step, history.to_initial),
        ("layer_by_epoch_to_final", final.step, history.to_final),
        ("layer_by_epoch_to_final_normalised", final.step, history.normalised),
        ("layer_by_layer", final.step, layer_by_layer(name, measure, final, final)),
        *(
            ("layer_by_layer_to_final", earlier.step, layer_by_layer(name, measure, earlier, final))
            for earlier in _earlier_snapshots(snapshots)
        ),
    ]
    return [
        Picture(
            tag=f"similarity_maps/{name}/{kind}",
            file=f"{clean(name)}-{kind}" + (f"-{step:09d}" if kind == "layer_by_layer_to_final" else ""),
            step=step,
            data=_with_chance(table, n, reliability),
            draw=heat_map,
        )
        for kind, step, table in maps
    ]


def _with_chance(table: SimilarityMap, n: int, reliability: Mapping[str, Reliability]) -> SimilarityMap:
    """Return the map with the number of samples, and what its values would be by chance."""
    chances = by_chance([layer.chance for layer in reliability.values()])
    if not chances or table.legend:
        return replace(table, n=n)
    return replace(table, n=n, note=f"By chance a layer's start and end score {chances}. {table.note}")


def _earlier_snapshots(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Return up to three snapshots before the last: the first, and two evenly spread."""
    indices = np.linspace(0, len(snapshots) - 1, EARLIER_MAPS + 1).round().astype(int)
    return [snapshots[index] for index in sorted(set(indices.tolist())) if index < len(snapshots) - 1]
