"""A sample as HTML shows it: an image as a picture, text as its words, a table's row as names and values."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lightning_interp import panels
from lightning_interp.batch import main_tensor
from lightning_interp.display import Display, kind_of
from lightning_interp.figures import png
from lightning_interp.records import Pixels, Shown

MOST_WORDS = 60
LONGEST_WORD = 40


@dataclass(frozen=True)
class Face:
    """One of the three, or a text alone.

    Args:
        picture: address of an image, with its content.
        text: words, or what there is to say instead.
        cells: (name, value) of each column.
    """

    picture: str = ""
    text: str = ""
    cells: tuple[tuple[str, str], ...] = ()


class Scored(NamedTuple):
    """A training sample in a query's list."""

    shown: Shown
    score: float
    face: Face


class Ranking(NamedTuple):
    """One of a query's lists: what it is called, what that means, and its samples, the strongest first."""

    heading: str
    about: str
    samples: list[Scored]


class Card(NamedTuple):
    """A query with its lists."""

    shown: Shown
    loss: float
    face: Face
    lists: list[Ranking]


class Suspect(NamedTuple):
    """A training sample to look at.

    Args:
        shown: with the network's own answer as its prediction.
        chance: probability that the network gives to the label; NaN where there are no classes.
        score: self-influence.
        face: how it is shown.
    """

    shown: Shown
    chance: float
    score: float
    face: Face


class Checked(NamedTuple):
    """Scores that retraining checked: (query, training sample, predicted, actual), a picture, what was retrained."""

    rows: list[tuple[str, str, str, str]]
    picture: Pixels
    heading: str


def face(value: Any, display: Display, columns: Sequence[int] | None = None) -> Face:
    """Return how a sample is shown.

    Args:
        value: the network's input, one sample.
        display: how samples are shown.
        columns: which columns of a table; those that `panels.columns_of` names when None.
    """
    if not display.show_inputs:
        return Face(text="not shown (show_inputs=False)")
    kind, tensor = kind_of(value), main_tensor(value)
    if kind == "image":
        return Face(picture=inline(png(np.asarray(panels.picture(value, display)))))
    if kind == "tokens":
        return Face(text=_sentence(display.words(tensor)))
    if kind == "table":
        return Face(cells=_cells(tensor.flatten(), columns or panels.columns_of(value) or (), display))
    return Face(text=f"tensor of shape {tuple(tensor.shape)}, mean {tensor.float().mean():.3g}")


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
