"""Similarity maps drawn as heat maps."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_interp.similarity.results import SimilarityMap
from lightning_interp.views.canvas import Pixels, render

# Numbers in more cells than 10 × 10 are too small to read in a report.
MOST_CELLS_WITH_NUMBERS = 100
# More names at an axis would overlap: the figure stops growing at 24 cells.
MOST_TICKS_PER_AXIS = 30
# Characters of a layer's name: longer ones would take more room than the map.
LONGEST_LAYER_NAME = 32
# The size of the numbers in cells, in points.
NUMBER_POINTS = 7.5
# Of the note below a map: characters per inch of the figure's width, and the height of a line.
CHARACTERS_PER_INCH, NOTE_LINE_INCHES = 14, 0.17


def heat_map(table: SimilarityMap) -> Pixels:
    """Draw a similarity map, 0 (dark) to 1 (bright), with a number in each cell where there is room.

    Values on a scale of their own go from the least to the largest. Of long layer names only the end is shown. Cells
    without a value (NaN) are hatched grey. The caption names the number of samples, and the reasons for caution.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    width, height = _inches(table)
    note = textwrap.wrap(f"n = {table.n} probe samples. {table.note}", int(width * CHARACTERS_PER_INCH))
    note_height = NOTE_LINE_INCHES * len(note)
    figure = Figure(figsize=(width, height + note_height), dpi=110)
    axes = figure.add_subplot()
    axes.patch.set(hatch="///", edgecolor="0.7", facecolor="0.9")  # shows through where a cell has no value
    values = np.ma.masked_invalid(table.values.detach().cpu().numpy())
    low, top = _colour_range(table, values)
    colours = colormaps["viridis_r" if table.distance else "viridis"].with_extremes(under="black")
    image = axes.imshow(values, vmin=low, vmax=top, cmap=colours, aspect="auto", interpolation="nearest")
    _set_ticks(axes, table)
    outside = (bool((values < low).any()), bool((values > top).any()))
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(outside, "neither")
    figure.colorbar(image, ax=axes, label=table.legend or _meaning_of_the_scale(table), extend=extend)
    axes.set_title(textwrap.fill(f"{table.measure}: {table.title}", int(width * 10)), fontsize=10)
    figure.text(0.01, 0.01, "\n".join(note), fontsize=7.5, color="0.3", va="bottom")
    figure.tight_layout(rect=(0, (note_height + 0.05) / figure.get_figheight(), 1, 1))
    if values.size <= MOST_CELLS_WITH_NUMBERS:
        split = low + 0.6 * (top - low)
        _write_numbers(axes, values, light=lambda v: low <= v < split if table.distance else v >= split)
    return render(figure)


def _inches(table: SimilarityMap) -> tuple[float, float]:
    """Return the width and height of the figure without its note: room for cells and for the names at both axes."""
    rows, columns = table.values.shape
    row_name, column_name = (
        max((min(len(name), LONGEST_LAYER_NAME) for name in names), default=0) for names in (table.rows, table.columns)
    )
    slanted = column_name > 3  # short names, such as epochs, stay level
    width = 2.6 + 0.38 * max(5, min(columns, 24)) + 0.075 * row_name
    return width, 1.7 + 0.34 * max(4, min(rows, 24)) + 0.055 * column_name * slanted


def _meaning_of_the_scale(table: SimilarityMap) -> str:
    if table.own_scale:
        return "the function's own scale"
    return "0: same" if table.distance else "1: same, 0: unrelated"


def _colour_range(table: SimilarityMap, values: np.ma.MaskedArray) -> tuple[float, float]:
    """Return the values at the ends of the colour scale."""
    if not values.count():
        return 0, 1
    least, largest = float(values.min()), float(values.max())
    if table.own_scale:
        return (least, largest) if least < largest else (least - 0.5, largest + 0.5)
    if table.distance:
        return 0, max(np.pi / 2, largest)
    return -0.005, 1 + 1e-6  # values that read 0.00 or 1.00 are inside the scale


def _without_front(name: str) -> str:
    return name if len(name) <= LONGEST_LAYER_NAME else f"…{name[1 - LONGEST_LAYER_NAME :]}"


def _set_ticks(axes: Axes, table: SimilarityMap) -> None:
    for axis, names in ((axes.xaxis, table.columns), (axes.yaxis, table.rows)):
        stride = -(-len(names) // MOST_TICKS_PER_AXIS)
        axis.set_ticks(range(0, len(names), stride), list(map(_without_front, names))[::stride])
    if max(map(len, table.columns), default=0) > 3:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlabel(table.column_title)
    axes.set_ylabel(table.row_title)


def _write_numbers(axes: Axes, values: np.ma.MaskedArray, light: Callable[[float], bool]) -> None:
    """Write each cell's value, unless cells are too small for it; black on light colours, white on dark ones."""
    window = axes.get_window_extent()
    most_characters = max((len(f"{value:.2f}") for value in values.compressed()), default=1)
    type_size = NUMBER_POINTS * axes.get_figure(root=True).dpi / 72  # type: ignore[union-attr]  # in pixels
    width, height = window.width / values.shape[1], window.height / values.shape[0]
    if width < 0.62 * type_size * most_characters or height < 1.2 * type_size:
        return
    for (row, column), value in np.ndenumerate(values.filled(np.nan)):
        text = "–" if np.isnan(value) else f"{value:.2f}"
        ink = "0.3" if np.isnan(value) else "black" if light(value) else "white"
        axes.text(column, row, text, ha="center", va="center", fontsize=NUMBER_POINTS, color=ink)
