"""Similarity tables drawn as heat maps, and a picture as PNG."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from lightning_interp.records import Pixels, SimilarityMap

MOST_NUMBERED = 100
MOST_TICKS = 30


def heat_map(table: SimilarityMap) -> Pixels:
    """Draw a table of similarities, 0 (dark) to 1 (bright), each cell with its number where there is room.

    Cells that the measure refuses (NaN) are hatched grey. The caption says from how many samples, and when not
    to trust the numbers.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    rows, columns = table.values.shape
    size = (2.6 + 0.38 * max(5, min(columns, 24)), 1.7 + 0.34 * max(4, min(rows, 24)))
    note = textwrap.wrap(f"n = {table.n} probe samples. {table.note}", int(size[0] * 14))
    figure = Figure(figsize=(size[0], size[1] + 0.17 * len(note)), dpi=110)
    axes = figure.add_subplot()
    values = np.ma.masked_invalid(table.values.detach().cpu().numpy())
    axes.patch.set(hatch="///", edgecolor="0.7", facecolor="0.9")
    top, colours = (np.pi / 2, "viridis_r") if table.distance else (1, "viridis")
    drawn = axes.imshow(values, vmin=0, vmax=top, cmap=colours, aspect="auto", interpolation="nearest")
    _ticks(axes, table)
    if rows * columns <= MOST_NUMBERED:
        _numbers(axes, values, light=(lambda v: v < 0.9) if table.distance else (lambda v: v >= 0.6))
    meaning = table.legend or ("0: same" if table.distance else "1: same, 0: unrelated")
    figure.colorbar(drawn, ax=axes, label=meaning)
    axes.set_title(f"{table.measure}: {table.title}", fontsize=10)
    figure.text(0.01, 0.01, "\n".join(note), fontsize=7.5, color="0.3", va="bottom")
    figure.tight_layout(rect=(0, (0.17 * len(note) + 0.05) / figure.get_figheight(), 1, 1))
    return render(figure)


def render(figure: Figure) -> Pixels:
    """Return a figure's pixels `(height, width, 3)`, without pyplot's global state."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png(pixels: Pixels) -> bytes:
    """Return an image as a PNG file's content."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _ticks(axes: Axes, table: SimilarityMap) -> None:
    for axis, names in ((axes.xaxis, table.columns), (axes.yaxis, table.rows)):
        stride = -(-len(names) // MOST_TICKS)
        axis.set_ticks(range(0, len(names), stride), list(names)[::stride])
    if max(map(len, table.columns), default=0) > 3:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlabel(table.column_title)
    axes.set_ylabel(table.row_title)


def _numbers(axes: Axes, values: np.ma.MaskedArray, light: Callable[[float], bool]) -> None:
    for (row, column), value in np.ndenumerate(values.filled(np.nan)):
        shown = "–" if np.isnan(value) else f"{value:.2f}"
        ink = "0.3" if np.isnan(value) else "black" if light(value) else "white"
        axes.text(column, row, shown, ha="center", va="center", fontsize=7.5, color=ink)
