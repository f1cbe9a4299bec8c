"""A sample as HTML shows it: an image as a picture, text as its words, a table's row as names and values."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lightning_interp.data.batch import main_tensor
from lightning_interp.views.canvas import Pixels, png
from lightning_interp.views.display import Display, SampleView, kind_of
from lightning_interp.views.sample import columns_of, picture

MOST_WORDS = 60
LONGEST_WORD = 40


@dataclass(frozen=True)
class SampleHTML:
    """One of the three, or a text alone.

    Args:
        picture: address of an image, with its content.
        text: words, or what there is to say instead.
        cells: (name, value) of each column.
    """

    picture: str = ""
    text: str = ""
    cells: tuple[tuple[str, str], ...] = ()


class ScoredSample(NamedTuple):
    """A training sample in a query's list."""

    view: SampleView
    score: float
    html: SampleHTML


class InfluenceList(NamedTuple):
    """One of a query's lists: what it is called, what that means, and its samples, the strongest first."""

    heading: str
    about: str
    samples: list[ScoredSample]


class QueryCard(NamedTuple):
    """A query with its lists."""

    view: SampleView
    loss: float
    html: SampleHTML
    lists: list[InfluenceList]


class SuspectSample(NamedTuple):
    """A training sample to look at.

    Args:
        view: with the network's own answer as its prediction.
        label_probability: that the network gives to the label; NaN where there are no classes.
        score: self-influence.
        html: how it is shown.
    """

    view: SampleView
    label_probability: float
    score: float
    html: SampleHTML


class RetrainingCheck(NamedTuple):
    """Scores that retraining checked: (query, training sample, predicted, actual), a picture, what was retrained."""

    rows: list[tuple[str, str, str, str]]
    picture: Pixels
    heading: str


def sample_html(value: Any, display: Display, columns: Sequence[int] | None = None) -> SampleHTML:
    """Return how a sample is shown.

    Args:
        value: the network's input, one sample.
        display: how samples are shown.
        columns: which columns of a table; those that `columns_of` names when None.
    """
    if not display.show_inputs:
        return SampleHTML(text="not shown (show_inputs=False)")
    kind, tensor = kind_of(value), main_tensor(value)
    if kind == "image":
        return SampleHTML(picture=inline(png(np.asarray(picture(value, display)))))
    if kind == "tokens":
        return SampleHTML(text=_sentence(display.words(tensor)))
    if kind == "table":
        return SampleHTML(cells=_cells(tensor.flatten(), columns or columns_of(value) or (), display))
    return SampleHTML(text=f"tensor of shape {tuple(tensor.shape)}, mean {tensor.float().mean():.3g}")


def inline(picture: bytes) -> str:
    """Return a PNG as an address that holds all of it."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def _sentence(words: Sequence[str]) -> str:
    cut = [word if len(word) <= LONGEST_WORD else word[: LONGEST_WORD - 1] + "…" for word in words[:MOST_WORDS]]
    return " ".join(cut) + (" …" if len(words) > MOST_WORDS else "")


def _cells(values: Tensor, columns: Sequence[int], display: Display) -> tuple[tuple[str, str], ...]:
    found = tuple((display.column(place), f"{float(values[place]):.3g}") for place in columns if place < len(values))
    left = len(values) - len(found)
    return (*found, (f"… {left} more", "")) if left > 0 else found
