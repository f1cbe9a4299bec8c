"""Samples for the HTML report: an image as a picture, text as words, a table's row as names and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lightning_interp.data.batch import main_tensor
from lightning_interp.views.canvas import Pixels, inline, png
from lightning_interp.views.display import Display, SampleView, kind_of
from lightning_interp.views.sample import columns_of, picture

# About ten lines in the box that a sample gets.
MOST_WORDS_IN_HTML = 60
# In characters: longer words, such as addresses, are cut.
LONGEST_WORD = 40


@dataclass(frozen=True)
class SampleHTML:
    """The content of a sample's box: one of the three fields, the others are empty.

    Args:
        picture: a `data:` address, which holds the image itself.
        text: words, or a description where the input is not shown.
        cells: (name, value) of each column.
    """

    picture: str = ""
    text: str = ""
    cells: tuple[tuple[str, str], ...] = ()


class ScoredSample(NamedTuple):
    """A training sample in a query's list, with its score."""

    view: SampleView
    score: float
    html: SampleHTML


class InfluenceList(NamedTuple):
    """One of a query's lists: its heading, what that means, and its samples, the strongest first."""

    heading: str
    about: str
    samples: list[ScoredSample]


class QueryCard(NamedTuple):
    """A query with its lists of training samples."""

    view: SampleView
    loss: float
    html: SampleHTML
    lists: list[InfluenceList]


class SuspectSample(NamedTuple):
    """A training sample with a large self-influence, which may be mislabelled.

    Args:
        view: the sample with the network's prediction.
        label_probability: the network's probability of the label; NaN where there are no classes.
        score: self-influence.
        html: the content of its box.
    """

    view: SampleView
    label_probability: float
    score: float
    html: SampleHTML


class RetrainingCheck(NamedTuple):
    """Scores beside the result of retraining.

    Args:
        rows: (query, training sample, predicted, actual rise of the loss), in words.
        picture: predicted against actual.
        heading: names what was retrained.
    """

    rows: list[tuple[str, str, str, str]]
    picture: Pixels
    heading: str


def sample_html(value: Any, display: Display, columns: Sequence[int] | None = None) -> SampleHTML:
    """Return the content of a sample's box.

    Args:
        value: the network's input, one sample.
        display: how samples are shown.
        columns: which columns of a table; those of `columns_of` when None.
    """
    if not display.show_inputs:
        return SampleHTML(text="not shown (show_inputs=False)")
    kind, tensor = kind_of(value), main_tensor(value)
    if kind == "image":
        return SampleHTML(picture=inline(png(np.asarray(picture(value, display)))))
    if kind == "tokens":
        return SampleHTML(text=_shortened_text(display.words(tensor)))
    if kind == "table":
        return SampleHTML(cells=_table_cells(tensor.flatten(), columns or columns_of(value) or (), display))
    return SampleHTML(text=f"tensor of shape {tuple(tensor.shape)}, mean {tensor.float().mean():.3g}")


def _shortened_text(words: Sequence[str]) -> str:
    first_words = words[:MOST_WORDS_IN_HTML]
    shortened = [word if len(word) <= LONGEST_WORD else word[: LONGEST_WORD - 1] + "…" for word in first_words]
    return " ".join(shortened) + (" …" if len(words) > MOST_WORDS_IN_HTML else "")


def _table_cells(values: Tensor, columns: Sequence[int], display: Display) -> tuple[tuple[str, str], ...]:
    cells = tuple(
        (display.column(column), f"{float(values[column]):.3g}") for column in columns if column < len(values)
    )
    left = len(values) - len(cells)
    return (*cells, (f"… {left} more", "")) if left > 0 else cells
