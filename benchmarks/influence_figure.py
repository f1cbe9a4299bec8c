"""The frontier of quality and cost, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
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
    """Draw quality against cost; rows below `lowest` are left out, and of one method in two batch sizes the dearer."""
    shown = [row for row in _cheapest(rows) if row["quality"] >= lowest]
    figure, axes = plt.subplots(figsize=(12, 7.5), dpi=120)
    for whose, colour in COLOURS.items():
        some = [row for row in shown if row["whose"] == whose]
        cost, quality = ([row[key] for row in some] for key in ("epochs", "quality"))
        axes.scatter(cost, quality, s=50 if whose == "ours" else 30, color=colour, label=whose, zorder=3)
    axes.set_xscale("log")
    axes.set_xlim(min(row["epochs"] for row in shown) / 1.5, max(row["epochs"] for row in shown) * 2)
    axes.set_ylim(lowest, 0.92)
    axes.set_xlabel("cost, in epochs of forward and backward over the training set")
    axes.set_ylabel("linear datamodeling score against 100 retrainings")
    axes.grid(alpha=0.2, linewidth=0.5)
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    line = _steps(axes, frontier([row for row in shown if row["whose"] == "ours"]))
    _label(figure, axes, shown, line)
    figure.savefig(path)
    plt.close(figure)


def _cheapest(rows: Sequence[Row]) -> list[Row]:
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["whose"], row["name"].removesuffix(", batches of 512").removesuffix(", through a loader")
        if key not in best or row["epochs"] < best[key]["epochs"]:
            best[key] = row
    return [row for row in best.values() if row["name"] != "default"]


def _steps(axes: Any, ours: Sequence[Row]) -> list[Bbox]:
    """Draw our frontier; return where its lines are."""
    cost, quality = ([row[key] for row in ours] for key in ("epochs", "quality"))
    x, y = np.repeat([*cost, 1e6], 2)[1:-1], np.repeat(quality, 2)
    x, y = np.insert(x, 0, cost[0]), np.insert(y, 0, 0)
    axes.plot(x, y, color=COLOURS["ours"], linewidth=1.2)
    axes.fill_between(x, y, 0, color=COLOURS["ours"], alpha=0.04, linewidth=0)
    ends = axes.transData.transform(np.column_stack([x, y]))
    return [Bbox([np.minimum(*pair), np.maximum(*pair)]).padded(1) for pair in pairwise(ends)]


def _label(figure: Any, axes: Any, rows: Sequence[Row], taken: Sequence[Bbox]) -> None:
    """Write each name beside its point, at the first place inside the axes that is still free."""
    figure.canvas.draw()
    renderer, inside = figure.canvas.get_renderer(), axes.get_window_extent()
    points = [axes.transData.transform((row["epochs"], row["quality"])) for row in rows]
    taken = [*taken, *(Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points)]
    taken.append(axes.get_legend().get_window_extent(renderer))
    for row in sorted(rows, key=lambda row: (row["whose"] != "ours", row["epochs"])):
        ours = row["whose"] == "ours"
        text = axes.annotate(
            row["name"].replace(" columns", "").replace(", batches of 512", ""),
            (row["epochs"], row["quality"]),
            (0, 0),
            textcoords="offset points",
            fontsize=8,
            color=COLOURS[row["whose"]],
            weight="bold" if ours else "normal",
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#aaaaaa", "shrinkA": 0, "shrinkB": 3},
        )
        taken.append(_placed(text, renderer, taken, inside))


def _placed(text: Any, renderer: Any, taken: Sequence[Bbox], inside: Bbox) -> Bbox:
    """Move a label to the nearest free place, and return it."""
    box = Bbox.null()
    for reach in range(8, 150, 4):
        for angle in np.linspace(0, 2 * np.pi, 24, endpoint=False):
            text.set_ha("left" if np.cos(angle) >= -1e-9 else "right")
            text.set_position((reach * np.cos(angle), reach * np.sin(angle)))
            text.update_positions(renderer)
            box = mpl.text.Text.get_window_extent(text, renderer).padded(1)
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if within and not any(box.overlaps(other) for other in taken):
                return box
    return box
