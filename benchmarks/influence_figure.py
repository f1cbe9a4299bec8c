"""The frontier of quality and cost, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.transforms import Bbox

Row = dict[str, Any]
COLOURS = {
    "ours": "#c1272d",
    "captum": "#4878a8",
    "kronfluence": "#6a9f58",
    "pyDVL": "#a87c4f",
    "traker": "#85709e",
    "dattri": "#7f7f7f",
    "curvlinops": "#3a9a9a",
}


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that no other row beats in both, cheapest first."""
    best = -np.inf
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["epochs"], -row["quality"])):
        if row["quality"] > best:
            best, kept = row["quality"], [*kept, row]
    return kept


def draw(rows: Sequence[Row], path: str, lowest: float = 0.2) -> None:
    """Draw quality against cost; rows below `lowest` are left out."""
    shown = [row for row in rows if row["quality"] >= lowest]
    figure, axes = plt.subplots(figsize=(11, 7), dpi=120)
    for whose, colour in COLOURS.items():
        some = [row for row in shown if row["whose"] == whose]
        if some:
            axes.scatter(
                [row["epochs"] for row in some],
                [row["quality"] for row in some],
                s=55 if whose == "ours" else 32,
                color=colour,
                label=whose,
                zorder=3,
            )
    _steps(axes, frontier([row for row in shown if row["whose"] == "ours"]))
    axes.set_xscale("log")
    axes.set_xlim(min(row["epochs"] for row in shown) / 1.6, max(row["epochs"] for row in shown) * 4)
    axes.set_ylim(lowest, 0.95)
    axes.set_xlabel("cost, in epochs of forward and backward over the training set")
    axes.set_ylabel("linear datamodeling score against 100 retrainings")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.legend(loc="lower right", frameon=True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _label(figure, axes, shown)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _steps(axes: Any, ours: Sequence[Row]) -> None:
    cost, quality = ([row[key] for row in ours] for key in ("epochs", "quality"))
    axes.plot([*cost, 1e6], [*quality, quality[-1]], drawstyle="steps-post", color=COLOURS["ours"], linewidth=1.2)


def _label(figure: Any, axes: Any, rows: Sequence[Row]) -> None:
    """Write each name beside its point, at the first place that is still free."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    points = [axes.transData.transform((row["epochs"], row["quality"])) for row in rows]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    taken.append(axes.get_legend().get_window_extent(renderer))
    for row in sorted(rows, key=lambda row: (row["whose"] != "ours", -row["quality"])):
        ours = row["whose"] == "ours"
        text = axes.annotate(
            row["name"],
            (row["epochs"], row["quality"]),
            (0, 0),
            textcoords="offset points",
            fontsize=8.5 if ours else 7.5,
            color=COLOURS[row["whose"]],
            weight="bold" if ours else "normal",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#999999", "shrinkA": 0, "shrinkB": 3},
        )
        taken.append(_place(text, renderer, taken))


def _place(text: Any, renderer: Any, taken: Sequence[Bbox]) -> Bbox:
    for reach in range(1, 14):
        for angle in np.linspace(0, 2 * np.pi, 16, endpoint=False):
            right = np.cos(angle) >= -1e-9
            text.set_ha("left" if right else "right")
            text.set_va("center")
            text.set_position((reach * 7 * np.cos(angle), reach * 7 * np.sin(angle)))
            box = text.get_tightbbox(renderer) if text.arrow_patch is None else _box(text, renderer)
            if not any(box.overlaps(other) for other in taken):
                return box
    return box


def _box(text: Any, renderer: Any) -> Bbox:
    """Return the box of the words alone, without the line to the point."""
    text.update_positions(renderer)
    return mpl.text.Text.get_window_extent(text, renderer).padded(1)
