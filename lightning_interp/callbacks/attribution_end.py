"""What is told of a run's attributions when training is over: films, drift, numbers, the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lightning_interp import report
from lightning_interp.attribution_panels import Titled, film
from lightning_interp.board import Board, clean
from lightning_interp.callbacks.attribution_look import Asked
from lightning_interp.callbacks.attribution_scores import Number, drift
from lightning_interp.callbacks.showing import write_section
from lightning_interp.figures import png
from lightning_interp.folder import Folder
from lightning_interp.map_store import MapStore
from lightning_interp.probe import Probe
from lightning_interp.records import MapSnapshot, Pixels, Shown

MOST_FRAMES = 8
COLUMNS = {
    "attribution_dead": "dead maps",
    "attribution_drift": "drift",
    "attribution_deletion": "deletion",
    "attribution_insertion": "insertion",
    "attribution_sanity": "sanity",
    "attribution_localization": "",
}


def tell(
    asked: Asked,
    store: MapStore,
    numbers: list[Number],
    shown: Sequence[Shown],
    final: Mapping[str, Pixels],
    root: Folder,
    room: str,
    board: Board,
    probe: Probe,
) -> None:
    """Bring films, curves and the report's part to the board and the run's folder.

    Args:
        asked: what was explained, and how.
        store: the maps of all looks.
        numbers: all numbers; those of the drift to the final maps are added.
        shown: the fixed samples, as they are answered at the end.
        final: `method/sample` → panel of the final network.
        root: the run's folder.
        room: the folder of the attributions in it.
        board: its loggers.
        probe: the fixed samples.
    """
    looks = [store.read(step) for step in store.steps]
    numbers += _to_final(looks, board)
    films = _films(asked, looks, shown)
    for name, pixels in films.items():
        board.image(f"attribution_film/{name}", pixels, looks[-1].step)
    for group, drawn in (("", final), ("film-", films)):
        for name, pixels in drawn.items():
            method, sample = name.split("/", 1)
            root.folder(room).write(f"{group}{method}-{clean(sample).replace('/', '_')}.png", png(pixels))
    table, notes = trust_table(numbers), _notes(asked, probe)
    board.text("attribution_notes/methods", "\n\n".join([*notes, report.markdown(table)]), looks[-1].step)
    section = report.attribution_section(_by_method(final), _by_method(films), table, notes)
    write_section(root, room, section)


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


def _to_final(looks: Sequence[MapSnapshot], board: Board) -> list[Number]:
    """Log each look's rank correlation with the last, and return the numbers."""
    found: list[Number] = []
    for look in looks:
        for method, value in drift(looks[-1].maps, look.maps).items():
            found.append(Number(look.step, look.epoch, f"attribution_drift/{method}/to_final", value))
    for tag in dict.fromkeys(number.tag for number in found):
        held = [number for number in found if number.tag == tag]
        board.history(tag, [number.step for number in held], [number.value for number in held])
    return found


def _films(asked: Asked, looks: Sequence[MapSnapshot], shown: Sequence[Shown]) -> dict[str, Pixels]:
    places = np.linspace(0, len(looks) - 1, min(MOST_FRAMES, len(looks))).round().astype(int)
    frames = [looks[place] for place in dict.fromkeys(places.tolist())]
    drawn: dict[str, Pixels] = {}
    for method in asked.methods:
        for place, sample in enumerate(shown):
            maps = [Titled(f"epoch {look.epoch}", look.maps[method][place]) for look in frames if method in look.maps]
            if maps and maps[-1].map.ndim in (1, 2):
                drawn[f"{method}/{sample.id}"] = film(
                    sample, maps, f"{method} of the label or first answer", asked.display
                )
    return drawn


def _by_method(drawn: Mapping[str, Pixels]) -> dict[str, list[bytes]]:
    groups: dict[str, list[bytes]] = {}
    for name, pixels in drawn.items():
        groups.setdefault(name.split("/", 1)[0], []).append(png(pixels))
    return groups


def _notes(asked: Asked, probe: Probe) -> list[str]:
    layers = {method: getattr(attributor, "layer", None) for method, attributor in asked.methods.items()}
    read = "; ".join(f"{method} at {layer}" for method, layer in layers.items() if layer)
    return [
        f"Maps of {probe.n} samples of the {probe.source}{f', {read}' if read else ''}.",
        "Dead maps: share that is zero everywhere or not finite. Drift: rank correlation with the look before."
        " Deletion and insertion: the target's mean probability while the most important parts are removed (lower is"
        " better) or brought back (higher is better). Sanity: rank correlation with the maps after the last layer was"
        " drawn anew; near 1, the map does not show what the network has learned. Centre and Edges look at no network:"
        " a method that does not beat them says little.",
    ]
