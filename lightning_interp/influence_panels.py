"""Pictures of influence: the training samples to look at first, and predictions beside retraining."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_interp.display import Display, kind_of
from lightning_interp.faces import Suspect
from lightning_interp.figures import render
from lightning_interp.panels import WRONG, columns_of, noted, tail
from lightning_interp.records import Pixels, SpotCheck
from lightning_interp.sheets import GAP, captioned, under

IMAGES_ACROSS, OTHERS_ACROSS = 8, 4


def suspects_sheet(suspects: Sequence[Suspect], title: str, display: Display) -> Pixels:
    """Draw training samples in rows, the first to look at first, in red where the network says another label.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    across = IMAGES_ACROSS if kind_of(suspects[0].shown.value) == "image" else OTHERS_ACROSS
    columns = columns_of(suspects[0].shown.value)
    tiles = [(held.shown, _said(held)) for held in suspects]
    rows = [noted(tiles[start : start + across], display, columns) for start in range(0, len(tiles), across)]
    return captioned([title], under(rows, gap=GAP))


def spot_scatter(checks: Sequence[SpotCheck]) -> Pixels:
    """Draw predicted against actual changes of loss; on the line they are equal.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    predicted, actual = np.array([(check.predicted, check.actual) for check in checks]).T
    figure = Figure(figsize=(4, 3.6), dpi=110)
    axes = figure.add_subplot()
    axes.axline((0, 0), slope=1, color="0.7", linewidth=1)
    axes.scatter(predicted, actual, s=22, color="#0072b2")
    axes.set_xlabel("predicted rise of the loss")
    whole = all(check.whole for check in checks)
    axes.set_ylabel("actual rise, " + ("retrained" if whole else "last layer retrained"))
    axes.ticklabel_format(style="sci", scilimits=(-2, 3))
    figure.tight_layout()
    return render(figure)


def _said(held: Suspect) -> str:
    shown = held.shown
    lines = [f"#{tail(shown.id)}", f"label {shown.label}", f"{WRONG if shown.wrong else ''}network: {shown.prediction}"]
    if held.chance == held.chance:
        lines.append(f"p(label) {held.chance:.2f}")
    return "\n".join([*lines, f"self-infl. {held.score:.3g}"])
