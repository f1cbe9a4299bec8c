"""Similarity tables drawn as heat maps, and a picture as PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_interp.similarity.results import SimilarityMap
from lightning_interp.views.canvas import Pixels, render

MOST_NUMBERED = 100

MOST_TICKS = 30

LONGEST = 32

POINTS = 7.5


def heat_map(table: SimilarityMap) -> Pixels:
    """Draw a table of similarities, 0 (dark) to 1 (bright), each cell with its number where there is room.

    Values on a scale of their own go from the least to the largest; long names lose their front.

    Cells that the measure refuses (NaN) are hatched grey. The caption says from how many samples, and when not
    to trust the numbers.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    rows, columns = table.values.shape
    labels = [max((min(len(name), LONGEST) for name in names), default=0) for names in (table.rows, table.columns)]
    size = (
        2.6 + 0.38 * max(5, min(columns, 24)) + 0.075 * labels[0],
        1.7 + 0.34 * max(4, min(rows, 24)) + 0.055 * labels[1] * (labels[1] > 3),
    )
    note = textwrap.wrap(f"n = {table.n} probe samples. {table.note}", int(size[0] * 14))
    figure = Figure(figsize=(size[0], size[1] + 0.17 * len(note)), dpi=110)
    axes = figure.add_subplot()
    values = np.ma.masked_invalid(table.values.detach().cpu().numpy())
    axes.patch.set(hatch="///", edgecolor="0.7", facecolor="0.9")
    low, top = _range(table, values)
    colours = colormaps["viridis_r" if table.distance else "viridis"].with_extremes(under="black")
    drawn = axes.imshow(values, vmin=low, vmax=top, cmap=colours, aspect="auto", interpolation="nearest")
    _ticks(axes, table)
    beyond = (bool((values < low).any()), bool((values > top).any()))
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(beyond, "neither")
    meaning = (
        "the function's own scale" if table.own_scale else "0: same" if table.distance else "1: same, 0: unrelated"
    )
    figure.colorbar(drawn, ax=axes, label=table.legend or meaning, extend=extend)
    title = textwrap.fill(f"{table.measure}: {table.title}", int(size[0] * 10))
    axes.set_title(title, fontsize=10)
    figure.text(0.01, 0.01, "\n".join(note), fontsize=7.5, color="0.3", va="bottom")
    figure.tight_layout(rect=(0, (0.17 * len(note) + 0.05) / figure.get_figheight(), 1, 1))
    if rows * columns <= MOST_NUMBERED:
        split = low + 0.6 * (top - low)
        _numbers(axes, values, light=lambda v: low <= v < split if table.distance else v >= split)
    return render(figure)


def _range(table: SimilarityMap, values: np.ma.MaskedArray) -> tuple[float, float]:
    """Return the values of the darkest and the brightest colour."""
    if not values.count():
        return 0, 1
    least, largest = float(values.min()), float(values.max())
    if table.own_scale:
        return (least, largest) if least < largest else (least - 0.5, largest + 0.5)
    return (0, max(np.pi / 2, largest)) if table.distance else (-0.005, 1 + 1e-6)  # what reads 0.00 is not below


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _ticks(axes: Axes, table: SimilarityMap) -> None:
    for axis, names in ((axes.xaxis, table.columns), (axes.yaxis, table.rows)):
        stride = -(-len(names) // MOST_TICKS)
        axis.set_ticks(range(0, len(names), stride), list(map(_short, names))[::stride])
    if max(map(len, table.columns), default=0) > 3:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlabel(table.column_title)
    axes.set_ylabel(table.row_title)


def _numbers(axes: Axes, values: np.ma.MaskedArray, light: Callable[[float], bool]) -> None:
    shown_in = axes.get_window_extent()
    longest = max((len(f"{value:.2f}") for value in values.compressed()), default=1)
    dot = axes.get_figure(root=True).dpi / 72  # type: ignore[union-attr]
    room = shown_in.width / values.shape[1], shown_in.height / values.shape[0]
    if room[0] < 0.62 * POINTS * longest * dot or room[1] < 1.2 * POINTS * dot:
        return
    for (row, column), value in np.ndenumerate(values.filled(np.nan)):
        shown = "–" if np.isnan(value) else f"{value:.2f}"
        ink = "0.3" if np.isnan(value) else "black" if light(value) else "white"
        axes.text(column, row, shown, ha="center", va="center", fontsize=POINTS, color=ink)
