"""What is told of a run's attributions when training is over: films, drift, numbers, the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from lightning_interp.attribution.results import MapSnapshot
from lightning_interp.callbacks.attribution.panels import AttributionSetup
from lightning_interp.callbacks.attribution.recording import AttributionRun
from lightning_interp.callbacks.attribution.scores import Number, drift
from lightning_interp.callbacks.loggers import Loggers
from lightning_interp.callbacks.publish import write_section
from lightning_interp.checks import clean, markdown
from lightning_interp.views import report
from lightning_interp.views.attribution import TitledMap, film
from lightning_interp.views.canvas import Pixels, png
from lightning_interp.views.display import SampleView

MOST_FRAMES = 8
COLUMNS = {
    "attribution_dead": "dead maps",
    "attribution_drift": "drift",
    "attribution_deletion": "deletion",
    "attribution_insertion": "insertion",
    "attribution_sanity": "sanity",
    "attribution_localization": "",
}


def report_attribution(
    run: AttributionRun, shown: Sequence[tuple[SampleView, str]], final: Mapping[str, Pixels], room: str, board: Loggers
) -> None:
    """Bring films, curves and the report's part to the board and the run's folder.

    Args:
        run: what the fit went by; the numbers of the drift to the final maps are added to its own.
        shown: the fixed samples, as they are answered at the end, each with what its numbers are of in words.
        final: `method/sample` → panel of the final network.
        room: the folder of the attributions in the run's.
        board: its loggers.
    """
    looks = [run.store.read(step) for step in run.store.steps]
    run.numbers.extend(_to_final(looks, run.mask, board))
    films = _films(run.asked, looks, shown)
    for name, pixels in films.items():
        board.image(f"attribution_film/{name}", pixels, looks[-1].step)
    for group, drawn in (("", final), ("film-", films)):
        for name, pixels in drawn.items():
            method, sample = name.split("/", 1)
            run.folder.write(f"{group}{method}-{clean(sample).replace('/', '_')}.png", png(pixels))
    table, notes = trust_table(run.numbers), _notes(run)
    board.text("attribution_notes/methods", "\n\n".join([*notes, markdown(table)]), looks[-1].step)
    write_section(run.root, room, report.attribution_section(_by_method(final), _by_method(films), table, notes))


def trust_table(numbers: Sequence[Number]) -> list[list[str]]:
    """Return the last value of each number as rows of text, one per method, a heading first."""
    last: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for number in sorted(numbers, key=lambda n: n.step):
        group, method, *which = number.tag.split("/")
        if which == ["to_final"]:
            continue  # of the last look it is 1
        column = " ".join(part for part in (COLUMNS[group], *(w.replace("_", " ") for w in which)) if part)
        columns += [] if column in columns else [column]
        last.setdefault(method, {})[column] = f"{number.value:.3f}" if number.value == number.value else "–"
    return [["method", *columns], *([method, *(row.get(c, "") for c in columns)] for method, row in last.items())]


def _to_final(looks: Sequence[MapSnapshot], mask: Tensor | None, board: Loggers) -> list[Number]:
    """Log each look's rank correlation with the last, and return the numbers."""
    found: list[Number] = []
    for look in looks:
        for method, value in drift(looks[-1].maps, look.maps, mask).items():
            found.append(Number(look.step, look.epoch, f"attribution_drift/{method}/to_final", value))
    for tag in dict.fromkeys(number.tag for number in found):
        held = [number for number in found if number.tag == tag]
        board.history(tag, [number.step for number in held], [number.value for number in held])
    return found


def _films(
    asked: AttributionSetup, looks: Sequence[MapSnapshot], shown: Sequence[tuple[SampleView, str]]
) -> dict[str, Pixels]:
    places = np.linspace(0, len(looks) - 1, min(MOST_FRAMES, len(looks))).round().astype(int)
    frames = [looks[place] for place in dict.fromkeys(places.tolist())]
    each_epoch = len({look.epoch for look in frames}) == len(frames)
    titles = [f"epoch {look.epoch}" if each_epoch else f"step {look.step}" for look in frames]
    drawn: dict[str, Pixels] = {}
    for method in asked.methods:
        for place, (sample, words) in enumerate(shown):
            pairs = zip(titles, frames, strict=True)
            maps = [TitledMap(title, look.maps[method][place]) for title, look in pairs if method in look.maps]
            if maps and maps[-1].map.ndim in (1, 2):
                drawn[f"{method}/{sample.id}"] = film(sample, maps, f"{method} of {words}", asked.display)
    return drawn


def _by_method(drawn: Mapping[str, Pixels]) -> dict[str, list[bytes]]:
    groups: dict[str, list[bytes]] = {}
    for name, pixels in drawn.items():
        groups.setdefault(name.split("/", 1)[0], []).append(png(pixels))
    return groups


def _notes(run: AttributionRun) -> list[str]:
    layers = {method: getattr(attributor, "layer", None) for method, attributor in run.asked.methods.items()}
    read = "; ".join(f"{method} at {layer}" for method, layer in layers.items() if layer)
    scored = min(run.scored, run.probe.n)
    notes = [
        f"Maps of {run.probe.n} samples of the {run.probe.source}{f', {read}' if read else ''}. Panels explain what the"
        " network answers at that moment, or what was asked for; numbers and films are of one target throughout, the"
        " label where there is one class, else what was answered before training.",
        "Dead maps: share that is zero everywhere or not finite. Drift: rank correlation with the look before."
        f" Deletion and insertion, of {scored} samples: the target's mean probability while the most important parts"
        " are removed (lower is better) or brought back (higher is better). Sanity, of the same: rank correlation with"
        " the maps after the last layer was drawn anew; near 1, the map does not show what the network has learned."
        " Centre and Edges look at no network: a method that does not beat them says little.",
    ]
    if run.measured is not None:
        notes.append(
            f"Against the given truth, of {run.measured.n} samples: pointing game, share of maps whose largest value is"
            " inside; energy inside, share of the positive map; error at 0.2, share of boxes around what exceeds 0.2 of"
            " the largest value that overlap the true one by half or less; best error, at the threshold that is best"
            " for these samples, and so optimistic."
        )
    return notes
