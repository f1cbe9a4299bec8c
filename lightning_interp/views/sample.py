"""Samples, maps and galleries drawn as images, fast enough for every epoch."""

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
    beside,
    captioned_image,
    fit_into_square,
    sheet_of_text,
    to_pixels,
    typeface,
    under,
    written,
)
from lightning_interp.views.display import Display, SampleView, kind_of

POSITIVE, NEGATIVE = (0, 114, 178), (213, 94, 0)
MOST_FEATURES = 10
TILE = SIDE // 2 + 16
WRONG = "✗ "
LINE_OF_NOTE = 17


def picture(value: Any, display: Display, side: int = SIDE, order: Sequence[int] | None = None) -> Image.Image:
    """Draw one sample: an image as it is, a table row as bars, token ids as words; a blank if private.

    Args:
        value: of the sample.
        display: how samples are shown.
        side: of the square, in pixels.
        order: which columns of a table to draw; the largest when None.
    """
    if not display.show_inputs:
        return sheet_of_text(["not shown:", "show_inputs", "= False"], side)
    kind = kind_of(value)
    if kind == "image":
        return fit_into_square(to_pixels(display.rgb(value)), side)
    if kind == "table":
        return bars(main_tensor(value), side, order=order, name=display.column)
    if kind == "tokens":
        return tokens(display.words(main_tensor(value)), None, side)
    tensor = main_tensor(value)
    return sheet_of_text([f"{tuple(tensor.shape)}", f"mean {tensor.float().mean():.3g}"], side)


def gallery(
    query: SampleView, query_note: str, rows: Sequence[tuple[str, Sequence[tuple[SampleView, str]]]], display: Display
) -> Pixels:
    """Draw a query beside rows of training samples.

    Args:
        query: the explained sample.
        query_note: what to say under it.
        rows: heading and (sample, note) pairs of each row; a line of a note that begins with `WRONG` is in red.
        display: how samples are shown.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    columns = columns_of(query.value)
    tiles = [(heading, noted(samples, display, columns)) for heading, samples in rows]
    right = [captioned_image([heading], row) for heading, row in tiles]
    left = noted([(query, query_note)], display, columns, SIDE)
    return np.asarray(beside([left, under(right)] if right else [left], gap=2 * GAP))


def columns_of(value: Any) -> list[int] | None:
    """Return the columns that a table's row is shown by, in which others can be compared with it; None if no table."""
    if kind_of(value) != "table":
        return None
    flat = main_tensor(value).flatten()
    return list(range(len(flat))) if len(flat) <= MOST_FEATURES else sorted(largest(flat))


def noted(
    samples: Sequence[tuple[SampleView, str]], display: Display, columns: Sequence[int] | None, side: int | None = None
) -> Image.Image:
    """Draw samples in a row, each over its lines of text.

    Args:
        samples: each with its note.
        display: how samples are shown.
        columns: which columns of a table.
        side: of each sample, in pixels; words and columns get more room than a picture when None.
    """
    if not samples:
        return sheet_of_nothing()
    side = side or (TILE if kind_of(samples[0][0].value) == "image" else SIDE)
    drawn = [picture(view.value, display, side, columns) for view, _ in samples]
    height = max(tile.height for tile in drawn)
    lines = [note.split("\n") for _, note in samples]
    room = LINE_OF_NOTE * max(map(len, lines))
    sheets = []
    for tile, said in zip(drawn, lines, strict=True):
        sheet = Image.new("RGB", (side, height + 4 + room), PAPER)
        sheet.paste(tile, ((side - tile.width) // 2, 0))
        for place, line in enumerate(said):
            ink = NEGATIVE if line.startswith(WRONG) else INK
            top = height + 4 + LINE_OF_NOTE * place
            written(ImageDraw.Draw(sheet), (side / 2, top), line, side, "ma", ink)
        sheets.append(sheet)
    return beside(sheets)


def tail(name: str, most: int = 14) -> str:
    """Return a name without its front where it is long, as of a path.

    >>> tail("images/train/0012.png")
    '…rain/0012.png'
    """
    return name if len(name) <= most else "…" + name[1 - most :]


def verdict(view: SampleView) -> str:
    """Return what is known of a sample in one line: true class, predicted class and probability."""
    said = f"true {view.label}" if view.label else "no label"
    if view.prediction:
        chance = f" ({view.probability:.2f})" if view.probability == view.probability else ""
        said += f"   predicted {view.prediction}{chance}"
    return said


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
        top: the value of a full bar; the largest absolute one where that is larger.
        order: which columns to draw, as many as there is room for; the largest when None.
        name: column → its name.
    """
    sheet = Image.new("RGB", (side, side), PAPER)
    pen = ImageDraw.Draw(sheet)
    flat = values.detach().cpu().double().flatten()
    order = largest(flat) if order is None else list(order)
    longest = max(float(flat.abs().max()), top, 1e-300)
    height = min(side / max(1, len(order)), 24)
    names = {index: name(index) for index in order}
    widest = max((pen.textlength(one, typeface(11)) for one in names.values()), default=0)
    start = min(max(side * 0.2, widest + 6), side * 0.45)
    for place, index in enumerate(sorted(order) if len(flat) <= MOST_FEATURES else order):
        value, top = float(flat[index]), place * height
        length = abs(value) / longest * (side * 0.72 - start)
        written(pen, (2, top + height / 2), names[index], start - 4, "lm", size=11)
        pen.rectangle((start, top + 3, start + length, top + height - 3), POSITIVE if value > 0 else NEGATIVE)
        pen.text((start + length + 4, top + height / 2), f"{value:.2g}", INK, typeface(11), anchor="lm")
    return sheet


def largest(values: Tensor) -> list[int]:
    """Return the columns that a row's bars are drawn of: the largest absolute values first."""
    return values.detach().cpu().flatten().abs().argsort(descending=True)[:MOST_FEATURES].tolist()


def shade_of(share: float) -> tuple[int, int, int]:
    """Return the colour of a share of the full shade, −1 to 1: orange to white to blue."""
    end, share = (POSITIVE if share > 0 else NEGATIVE), min(abs(share), 1.0)
    red, green, blue = (int(255 - (255 - c) * 0.6 * share) for c in end)
    return red, green, blue


def tokens(words: Sequence[str], weights: Tensor | None, side: int, top: float | None = None) -> Image.Image:
    """Draw words in lines, each on a shade that tells its weight: blue for positive, orange for negative.

    Args:
        words: one per token.
        weights: `(tokens,)`; no shades when None.
        side: width, and at most the height, in pixels.
        top: the weight of the full shade; the largest absolute one when None.
    """
    sheet = Image.new("RGB", (side, side), PAPER)
    pen, font = ImageDraw.Draw(sheet), typeface(13)
    full = max(top or (0.0 if weights is None else scale_of(weights)), 1e-300)
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


def sheet_of_nothing() -> Image.Image:
    """Return the word "none" where a row of samples would be."""
    sheet = Image.new("RGB", (TILE, LINE), PAPER)
    written(ImageDraw.Draw(sheet), (2, 0), "none", TILE, "la")
    return sheet
