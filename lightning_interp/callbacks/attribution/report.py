"""What is reported of a run's attributions when training is over: panels, films, curves, and how far to trust them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lightning_interp.attribution.results import MapSnapshot
from lightning_interp.callbacks.attribution.panels import (
    ExplainedBatch,
    explained_in_words,
    panels_of,
)
from lightning_interp.callbacks.attribution.recording import SCORES_FILE, AttributionRun
from lightning_interp.callbacks.attribution.scores import Number, drift, scores_table
from lightning_interp.callbacks.publish import Curve, Findings
from lightning_interp.checks import clean
from lightning_interp.views.attribution import TitledMap, film
from lightning_interp.views.canvas import Pixels
from lightning_interp.views.display import Display, SampleView
from lightning_interp.views.report import Block, Fold, Heading, Paragraph, Picture, Pictures, Section, Table
from lightning_interp.views.tables import as_markdown

TITLE = "Where the network looks"
FILM_SUMMARY = "Film over epochs, of the label (or what was answered before training), each on one colour scale"
MOST_FRAMES = 8  # as many maps stand side by side in a film before they become too small to read
COLUMNS = {
    "attribution_dead": "dead maps",
    "attribution_drift": "drift",
    "attribution_deletion": "deletion",
    "attribution_insertion": "insertion",
    "attribution_sanity": "sanity",
    "attribution_localization": "",
}


class Film(NamedTuple):
    """What is drawn of one sample and method over epochs (see `film`)."""

    view: SampleView
    frames: Sequence[TitledMap]
    title: str
    display: Display

    def draw(self) -> Pixels:
        """Return the drawing."""
        return film(*self)


def attribution_findings(run: AttributionRun, batches: Sequence[ExplainedBatch]) -> Findings:
    """Compare all stored maps with the last, and gather everything that is reported.

    Args:
        run: the state of the fit; the numbers of the drift to the final maps are added to its own.
        batches: the fixed samples, explained by the final network.
    """
    snapshots = [run.store.read(step) for step in run.store.steps]
    step = snapshots[-1].step
    to_final = _drift_to_final(snapshots, run.mask)
    run.numbers.extend(to_final)
    panels = {
        name: Picture("", _file_name(name), step, panel, type(panel).draw)
        for name, panel in panels_of(batches, run.setup, "final network").items()
    }
    films = {
        name: Picture(f"attribution_film/{name}", f"film-{_file_name(name)}", step, one, Film.draw)
        for name, one in _films(run, snapshots, batches).items()
    }
    table, notes = trust_table(run.numbers), _notes(run)
    blocks: list[Block] = [*map(Paragraph, notes), Table(table)]
    for method in run.setup.methods:
        blocks += [Heading(method), Pictures(_of_method(method, panels), "panel")]
        if own_films := _of_method(method, films):
            blocks.append(Fold(FILM_SUMMARY, [Pictures(own_films, "film")]))
    return Findings(
        step=step,
        section=Section(TITLE, blocks),
        curves=_curves(to_final),
        pictures=[*films.values(), *panels.values()],
        texts={"attribution_notes/methods": "\n\n".join([*notes, as_markdown(table)])},
        files={SCORES_FILE: scores_table(run.numbers)},
    )


def _file_name(name: str) -> str:
    method, sample = name.split("/", 1)
    return f"{method}-{clean(sample).replace('/', '_')}"


def _of_method(method: str, pictures: Mapping[str, Picture]) -> list[tuple[str, Picture]]:
    return [(name, picture) for name, picture in pictures.items() if name.split("/", 1)[0] == method]


def trust_table(numbers: Sequence[Number]) -> list[list[str]]:
    """Return the last value of each number as rows of text, one per method, a heading first."""
    last: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for number in sorted(numbers, key=lambda n: n.step):
        group, method, *which = number.tag.split("/")
        if which == ["to_final"]:
            continue  # of the last moment it is 1
        column = " ".join(part for part in (COLUMNS[group], *(w.replace("_", " ") for w in which)) if part)
        columns += [] if column in columns else [column]
        last.setdefault(method, {})[column] = f"{number.value:.3f}" if number.value == number.value else "–"
    return [["method", *columns], *([method, *(row.get(c, "") for c in columns)] for method, row in last.items())]


def _drift_to_final(snapshots: Sequence[MapSnapshot], mask: Tensor | None) -> list[Number]:
    """Return each moment's rank correlation with the last."""
    return [
        Number(snapshot.step, snapshot.epoch, f"attribution_drift/{method}/to_final", value)
        for snapshot in snapshots
        for method, value in drift(snapshots[-1].maps, snapshot.maps, mask).items()
    ]


def _curves(numbers: Sequence[Number]) -> list[Curve]:
    by_tag: dict[str, list[Number]] = {}
    for number in numbers:
        by_tag.setdefault(number.tag, []).append(number)
    return [Curve(tag, [n.step for n in of_tag], [n.value for n in of_tag]) for tag, of_tag in by_tag.items()]


def _films(run: AttributionRun, snapshots: Sequence[MapSnapshot], batches: Sequence[ExplainedBatch]) -> dict[str, Film]:
    """Return each method's film of each sample, `method/sample` → film."""
    frames = _frames(snapshots)
    views = [
        (view, explained_in_words(batch, target, index, run.setup.display))
        for batch, target in zip(batches, run.targets, strict=True)
        for index, view in enumerate(batch.views)
    ]
    films: dict[str, Film] = {}
    for method in run.setup.methods:
        for index, (view, words) in enumerate(views):
            maps = [TitledMap(title, one.maps[method][index]) for title, one in frames if method in one.maps]
            if maps and maps[-1].map.ndim in (1, 2):
                films[f"{method}/{view.id}"] = Film(view, maps, f"{method} of {words}", run.setup.display)
    return films


def _frames(snapshots: Sequence[MapSnapshot]) -> list[tuple[str, MapSnapshot]]:
    """Return up to eight moments, evenly spread, each with its epoch (or step) in words."""
    indices = np.linspace(0, len(snapshots) - 1, min(MOST_FRAMES, len(snapshots))).round().astype(int)
    frames = [snapshots[index] for index in dict.fromkeys(indices.tolist())]
    each_epoch = len({one.epoch for one in frames}) == len(frames)
    return [(f"epoch {one.epoch}" if each_epoch else f"step {one.step}", one) for one in frames]


def _notes(run: AttributionRun) -> list[str]:
    layers = {method: getattr(attributor, "layer", None) for method, attributor in run.setup.methods.items()}
    read = "; ".join(f"{method} at {layer}" for method, layer in layers.items() if layer)
    scored = min(run.scored, run.probe.n)
    notes = [
        f"Maps of {run.probe.n} samples of the {run.probe.source}{f', {read}' if read else ''}. Panels explain what the"
        " network answers at that moment, or what was asked for; numbers and films are of one target throughout, the"
        " label where there is one class, else what was answered before training.",
        "Dead maps: share that is zero everywhere or not finite. Drift: rank correlation with the evaluation before."
        f" Deletion and insertion, of {scored} samples: the target's mean probability while the most important parts"
        " are removed (lower is better) or brought back (higher is better). Sanity, of the same: rank correlation with"
        " the maps after the last layer was drawn anew; near 1, the map does not show what the network has learned."
        " Centre and Edges depend on no network: a method that does not beat them says little.",
    ]
    if run.localized is not None:
        notes.append(
            f"Against the given truth, of {run.localized.n} samples: pointing game, share of maps whose largest value"
            " is inside; energy inside, share of the positive map; error at 0.2, share of boxes around what exceeds 0.2"
            " of the largest value that overlap the true one by half or less; best error, at the threshold that is best"
            " for these samples, and so optimistic."
        )
    return notes
