"""Figures of influence: suspect samples, predicted against actual loss changes, the factors of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_interp.influence.logistic import Factors
from lightning_interp.influence.results import SpotCheck
from lightning_interp.influence.validation import Retrained
from lightning_interp.views.canvas import GAP, Pixels, caption_above, render, stacked
from lightning_interp.views.display import Display, kind_of
from lightning_interp.views.sample import WRONG, columns_of, row_of_samples, shortened_name
from lightning_interp.views.sample_html import SuspectSample

# In a row: as many as are about as wide as a report's page.
IMAGES_ACROSS, TEXTS_ACROSS = 8, 4
HELPFUL, HARMFUL = "#1f6fb4", "#d9661f"


def suspects_sheet(suspects: Sequence[SuspectSample], title: str, display: Display) -> Pixels:
    """Draw training samples in rows, the most suspect first; a red line where the network predicts another label.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    across = IMAGES_ACROSS if kind_of(suspects[0].view.value) == "image" else TEXTS_ACROSS
    columns = columns_of(suspects[0].view.value)
    tiles = [(suspect.view, _suspect_note(suspect)) for suspect in suspects]
    rows = [row_of_samples(tiles[start : start + across], display, columns) for start in range(0, len(tiles), across)]
    return caption_above([title], stacked(rows, gap=GAP))


def spot_scatter(checks: Sequence[SpotCheck]) -> Pixels:
    """Draw predicted against actual loss changes, a point for each check; on the line they are equal.

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


def _suspect_note(suspect: SuspectSample) -> str:
    view = suspect.view
    lines = [
        f"#{shortened_name(view.id)}",
        f"label {view.label}",
        f"{WRONG if view.wrong else ''}network: {view.prediction}",
    ]
    if not math.isnan(suspect.label_probability):
        lines.append(f"p(label) {suspect.label_probability:.2f}")
    return "\n".join([*lines, f"self-infl. {suspect.score:.3g}"])


class RetrainingPanel(NamedTuple):
    """The data of one panel of `scatter`.

    Args:
        title: model and method.
        retrained: predicted and actual loss changes.
        random: which of the m removals were picked at random; the others have the largest scores.
    """

    title: str
    retrained: Retrained
    random: Bool[Tensor, " m"]


class QuerySamplePair(NamedTuple):
    """A query and a training sample, by their row and column in `Factors`.

    Args:
        query: its row.
        train: its column.
        name: of the pair, in words.
    """

    query: int
    train: int
    name: str


def scatter(panels: Sequence[RetrainingPanel]) -> Pixels:
    """Draw predicted against actual loss changes, a point for each query and removal; on the line they are equal.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    figure = Figure(figsize=(4.6 * len(panels), 4.9), dpi=110, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _scatter_axes(axes, panel)
    return render(figure)


def factors(factors_of_scores: Factors, pairs: Sequence[QuerySamplePair]) -> Pixels:
    """Draw the factors of a few scores of logistic regression as bars, a row for each pair.

    Every column has one scale for all its rows; a bar to the left is negative. A score is the product of the query's
    residual, the training loss and the closeness of both (labels and features), divided by n.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    columns = {
        "query's residual": [float(factors_of_scores.query_residual[pair.query]) for pair in pairs],
        "training loss": [float(factors_of_scores.training_loss[pair.train]) for pair in pairs],
        "closeness of labels": [float(factors_of_scores.labels[pair.query, pair.train]) for pair in pairs],
        "closeness of features": [float(factors_of_scores.features[pair.query, pair.train]) for pair in pairs],
        "closeness of both": [float(factors_of_scores.closeness[pair.query, pair.train]) for pair in pairs],
        "score": [float(factors_of_scores.scores[pair.query, pair.train]) for pair in pairs],
    }
    figure = Figure(figsize=(1.7 * len(columns) + 2, 1.0 + 0.36 * len(pairs)), dpi=110, layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(columns), sharey=True), columns.items(), strict=True):
        _bar_axes(axes, name, values)
    first = figure.axes[0]
    first.set_yticks(range(len(pairs)), [pair.name for pair in pairs], fontsize=8)
    first.invert_yaxis()
    return render(figure)


def impact(sizes: Sequence[int], scores: Float[Tensor, "sizes draws"]) -> Pixels:
    """Draw the mean absolute score of one training sample against the number of training samples, both logarithmic.

    Dots are random subsets; the dashed line falls as 1/n and meets the mean at the largest size.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    figure = Figure(figsize=(5.2, 4.2), dpi=110, layout="constrained")
    axes, n, values = figure.add_subplot(), np.asarray(sizes, dtype=float), scores.cpu().double().numpy()
    mean = values.mean(1)
    slope = np.polyfit(np.log(n), np.log(mean), 1)[0] if len(n) > 1 else np.nan
    axes.loglog(n, mean[n.argmax()] * n.max() / n, "--", color=HARMFUL, label="1/n alone")
    axes.loglog(n, values, "o", color=HELPFUL, markersize=4, alpha=0.5)
    axes.loglog(n, mean, color=HELPFUL, linewidth=2, label=f"mean, as n to the power {slope:.2f}".replace("-", "−"))
    axes.set(
        xlabel="training samples n", ylabel="mean |score| of one sample (loss)", title="Impact of one training sample"
    )
    axes.legend(fontsize=8, frameon=False)
    return render(figure)


def _scatter_axes(axes: Axes, panel: RetrainingPanel) -> None:
    retrained, random = panel.retrained, panel.random.cpu().numpy()
    predicted, actual = (side.detach().cpu().numpy() for side in (retrained.predicted, retrained.actual))
    extremes = np.array([min(predicted.min(), actual.min()), max(predicted.max(), actual.max())])
    axes.axline((0, 0), slope=1, color="0.6", linewidth=1)
    for colour, columns, name in ((HELPFUL, ~random, "most influential"), (HARMFUL, random, "random")):
        if columns.any():
            count = f"{name}: {int(columns.sum())} removals"
            axes.plot(
                predicted[:, columns].ravel(), actual[:, columns].ravel(), ".", color=colour, label=count, alpha=0.5
            )
    limits = extremes + 0.04 * np.ptp(extremes) * np.array([-1, 1])
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.set(xlabel="predicted loss change", ylabel="actual loss change after retraining")
    numbers = f"r = {retrained.pearson:.3f}, Spearman {retrained.spearman:.3f}, slope {retrained.slope:.2f}"
    axes.set_title(f"{panel.title}\n{numbers}", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def _bar_axes(axes: Axes, name: str, values: Sequence[float]) -> None:
    top = max(max(map(abs, values)), np.finfo(float).tiny)
    axes.barh(range(len(values)), values, color=[HELPFUL if value >= 0 else HARMFUL for value in values], height=0.7)
    for row, value in enumerate(values):
        axes.text(max(value, 0) + 0.04 * top, row, _two_digits(value), fontsize=8, va="center")
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_xlim(-1.1 * top if min(values) < 0 else 0, 1.6 * top)
    axes.set_title(name, fontsize=9, loc="left" if min(values) >= 0 else "center")
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)


def _two_digits(value: float) -> str:
    """Return two significant digits, without an exponent."""
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}").replace("-", "−")
