"""Samples, their rows and galleries, drawn with Pillow: fast enough for every epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_interp.data.batch import main_tensor
from lightning_interp.views.canvas import (
    GAP,
    INK,
    LINE,
    PAPER,
    SIDE,
    Pixels,
    fit_into_square,
    side_by_side,
    stacked,
    text_square,
    to_pixels,
    typeface,
    with_caption,
    write_line,
)
from lightning_interp.views.display import Display, SampleView, kind_of

# Blue and orange of the Okabe-Ito palette, which colour-blind readers tell apart.
POSITIVE, NEGATIVE = (0, 114, 178), (213, 94, 0)
# As many bars as fit a square of SIDE with readable names.
MOST_BARS = 10
# The side of an image in a row: half the query's, and a little more for the lines under it.
TILE = SIDE // 2 + 16
# Begins a line of a note that is written in red: the prediction differs from the label.
WRONG = "✗ "
# The distance between lines of a note, in pixels.
LINE_OF_NOTE = 17
# Divides in place of 0 where all values are 0.
SMALLEST_DIVISOR = 1e-300


def picture(value: Any, display: Display, side: int = SIDE, order: Sequence[int] | None = None) -> Image.Image:
    """Draw one sample: an image as it is, a table's row as bars, tokens as words; a grey square if inputs are private.

    Args:
        value: the sample's input.
        display: how samples are shown.
        side: of the square, in pixels.
        order: which columns of a table to draw; the largest when None.
    """
    if not display.show_inputs:
        return text_square(["not shown:", "show_inputs", "= False"], side)
    kind = kind_of(value)
    if kind == "image":
        return fit_into_square(to_pixels(display.rgb(value)), side)
    if kind == "table":
        return bars(main_tensor(value), side, order=order, name=display.column)
    if kind == "tokens":
        return tokens(display.words(main_tensor(value)), None, side)
    tensor = main_tensor(value)
    return text_square([f"{tuple(tensor.shape)}", f"mean {tensor.float().mean():.3g}"], side)


def gallery(
    query: SampleView, query_note: str, rows: Sequence[tuple[str, Sequence[tuple[SampleView, str]]]], display: Display
) -> Pixels:
    """Draw a query, and beside it rows of training samples.

    Args:
        query: the explained sample.
        query_note: lines of text under it.
        rows: of each row, its heading and (sample, note) pairs; a line of a note that begins with `WRONG` is in red.
        display: how samples are shown.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    columns = columns_of(query.value)
    tiles = [(heading, row_of_samples(samples, display, columns)) for heading, samples in rows]
    right = [with_caption([heading], row) for heading, row in tiles]
    left = row_of_samples([(query, query_note)], display, columns, SIDE)
    return np.asarray(side_by_side([left, stacked(right)] if right else [left], gap=2 * GAP))


def columns_of(value: Any) -> list[int] | None:
    """Return the columns of a table to show, so that other rows can be compared with this one; None if no table."""
    if kind_of(value) != "table":
        return None
    flat = main_tensor(value).flatten()
    return list(range(len(flat))) if len(flat) <= MOST_BARS else sorted(largest(flat))


def row_of_samples(
    samples: Sequence[tuple[SampleView, str]], display: Display, columns: Sequence[int] | None, side: int | None = None
) -> Image.Image:
    """Draw samples side by side, each above the lines of its note.

    Args:
        samples: each with its note.
        display: how samples are shown.
        columns: which columns of a table.
        side: of each sample, in pixels; words and columns get more room than a picture when None.
    """
    if not samples:
        return none_tile()
    side = side or (TILE if kind_of(samples[0][0].value) == "image" else SIDE)
    tiles = [picture(view.value, display, side, columns) for view, _ in samples]
    height = max(tile.height for tile in tiles)
    lines = [note.split("\n") for _, note in samples]
    note_height = LINE_OF_NOTE * max(map(len, lines))
    sheets = []
    for tile, note_lines in zip(tiles, lines, strict=True):
        sheet = Image.new("RGB", (side, height + 4 + note_height), PAPER)
        sheet.paste(tile, ((side - tile.width) // 2, 0))
        for index, line in enumerate(note_lines):
            ink = NEGATIVE if line.startswith(WRONG) else INK
            y = height + 4 + LINE_OF_NOTE * index
            write_line(ImageDraw.Draw(sheet), (side / 2, y), line, side, "ma", ink)
        sheets.append(sheet)
    return side_by_side(sheets)


def shortened_name(name: str, max_length: int = 14) -> str:
    """Return the end of a long name, such as a path: there names differ.

    >>> shortened_name("images/train/0012.png")
    '…rain/0012.png'
    """
    return name if len(name) <= max_length else "…" + name[1 - max_length :]


def verdict(view: SampleView) -> str:
    """Return a sample's true class, predicted class and probability in one line."""
    line = f"true {view.label}" if view.label else "no label"
    if view.prediction:
        probability = f" ({view.probability:.2f})" if view.probability == view.probability else ""
        line += f"   predicted {view.prediction}{probability}"
    return line


def scale_of(attribution: Tensor) -> float:
    """Return the largest absolute value of a map: the end of its colour scale."""
    return float(attribution.abs().max()) if attribution.numel() else 0.0


def bars(
    values: Tensor,
    side: int,
    top: float = 0.0,
    order: Sequence[int] | None = None,
    name: Callable[[int], str] = "x{}".format,
) -> Image.Image:
    """Draw a row's values as bars, the largest absolute ones first, blue for positive, orange for negative.

    Args:
        values: one per column.
        side: of the square, in pixels.
        top: the value of a full bar; the largest absolute value if that is larger.
        order: which columns to draw; those with the largest absolute values when None.
        name: column → its name.
    """
    sheet = Image.new("RGB", (side, side), PAPER)
    pen = ImageDraw.Draw(sheet)
    flat = values.detach().cpu().double().flatten()
    order = largest(flat) if order is None else list(order)
    longest = max(float(flat.abs().max()), top, SMALLEST_DIVISOR)
    height = min(side / max(1, len(order)), 24)
    names = {index: name(index) for index in order}
    widest = max((pen.textlength(column_name, typeface(11)) for column_name in names.values()), default=0)
    start = min(max(side * 0.2, widest + 6), side * 0.45)
    for row, index in enumerate(sorted(order) if len(flat) <= MOST_BARS else order):
        value, y = float(flat[index]), row * height
        length = abs(value) / longest * (side * 0.72 - start)
        write_line(pen, (2, y + height / 2), names[index], start - 4, "lm", size=11)
        pen.rectangle((start, y + 3, start + length, y + height - 3), POSITIVE if value > 0 else NEGATIVE)
        pen.text((start + length + 4, y + height / 2), f"{value:.2g}", INK, typeface(11), anchor="lm")
    return sheet


def largest(values: Tensor) -> list[int]:
    """Return the columns with the largest absolute values, the largest first, as many as bars fit."""
    return values.detach().cpu().flatten().abs().argsort(descending=True)[:MOST_BARS].tolist()


def shade_of(share: float) -> tuple[int, int, int]:
    """Return the colour of a share of the full shade: orange at −1, white at 0, blue at 1."""
    end, share = (POSITIVE if share > 0 else NEGATIVE), min(abs(share), 1.0)
    red, green, blue = (int(255 - (255 - c) * 0.6 * share) for c in end)
    return red, green, blue


def tokens(words: Sequence[str], weights: Tensor | None, side: int, top: float | None = None) -> Image.Image:
    """Draw words in lines, each on a shade that shows its weight: blue for positive, orange for negative.

    Args:
        words: one per token.
        weights: `(tokens,)`; no shades when None.
        side: width, and at most the height, in pixels.
        top: the weight of the full shade; the largest absolute weight when None.
    """
    sheet = Image.new("RGB", (side, side), PAPER)
    pen, font = ImageDraw.Draw(sheet), typeface(13)
    full = max(top or (0.0 if weights is None else scale_of(weights)), SMALLEST_DIVISOR)
    shades = [0.0] * len(words) if weights is None else (weights / full).clamp(-1, 1).tolist()
    x, y = 2.0, 2.0
    for word, shade in zip(words, shades, strict=False):
        width = pen.textlength(word, font)
        if x + width > side and x > 2:
            x, y = 2.0, y + 19
        if y + 19 > side:
            pen.text((side - 14, side - 14), "…", INK, font)
            break
        pen.rectangle((x - 1, y, x + width + 1, y + 17), shade_of(shade))
        pen.text((x, y), word, INK, font)
        x += width + 5
    return sheet.crop((0, 0, side, min(side, int(y) + 20)))


def none_tile() -> Image.Image:
    """Return a tile with the word "none", for a row without samples."""
    sheet = Image.new("RGB", (TILE, LINE), PAPER)
    write_line(ImageDraw.Draw(sheet), (2, 0), "none", TILE, "la")
    return sheet
