"""Samples, maps and galleries drawn as images, fast enough for every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_interp.batch import main_tensor
from lightning_interp.display import Display, kind_of
from lightning_interp.records import Pixels, Shown

SIDE = 168
GAP = 8
LINE = 20
CAPTION = 15
INK, PAPER, FAINT = (20, 20, 20), (255, 255, 255), (225, 225, 225)
POSITIVE, NEGATIVE = (0, 114, 178), (213, 94, 0)
MOST_FEATURES = 10


def picture(value: Any, display: Display, side: int = SIDE) -> Image.Image:
    """Draw one sample: an image as it is, a table row as bars, token ids as words; a blank if private."""
    if not display.show_inputs:
        return _sheet_of_text(["not shown", "(show_inputs=False)"], side)
    kind = kind_of(value)
    if kind == "image":
        return _fit(_to_pixels(display.rgb(value)), side)
    if kind == "table":
        return bars(main_tensor(value), side)
    if kind == "tokens":
        return tokens(display.words(main_tensor(value)), None, side)
    tensor = main_tensor(value)
    return _sheet_of_text([f"{tuple(tensor.shape)}", f"mean {tensor.float().mean():.3g}"], side)


def attribution_panel(shown: Shown, attribution: Tensor, title: str, display: Display) -> Pixels:
    """Draw a sample beside its attribution, with true and predicted class, and the map's own scale.

    An image gets its map as an overlay with a colour bar from 0 to the map's largest absolute value (over
    channels, if it has them); a table bars, blue for positive; tokens a shade each. A map that is zero or
    not finite is said to be so instead of being drawn.

    Args:
        shown: the sample.
        attribution: its map: in the input's shape, `(H, W)`, or `(tokens,)`.
        title: method, layer and moment.
        display: how samples are shown.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    kind = kind_of(shown.value)
    left = picture(shown.value, display)
    trouble = _trouble(attribution)
    if trouble:
        right = _sheet_of_text([trouble], SIDE)
    elif not display.show_inputs and kind != "image":
        right = _sheet_of_text(["not shown"], SIDE)
    elif kind == "image":
        right = _overlay(shown.value, attribution, display)
    elif kind == "table":
        right = bars(attribution, SIDE)
    elif attribution.ndim != 1:
        right = _sheet_of_text([f"map of shape {tuple(attribution.shape)}", "is not drawn"], SIDE)
    else:
        right = tokens(display.words(main_tensor(shown.value)), attribution, SIDE)
    caption = [f"#{shown.id}   {verdict(shown)}", title]
    return _captioned(caption, _beside([left, right]))


def gallery(
    query: Shown, query_note: str, rows: Sequence[tuple[str, Sequence[tuple[Shown, str]]]], display: Display
) -> Pixels:
    """Draw a query beside rows of training samples.

    Args:
        query: the explained sample.
        query_note: what to say under it.
        rows: heading and (sample, note) pairs of each row.
        display: how samples are shown.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    side = SIDE // 2 + 16
    tiles = [(heading, [_noted(s, note, display, side) for s, note in samples]) for heading, samples in rows]
    right = _under([_captioned_image([heading], _beside(row)) for heading, row in tiles if row])
    left = _noted(query, query_note, display, SIDE, lines=4)
    return np.asarray(_beside([left, right]))


def verdict(shown: Shown) -> str:
    """Return what is known of a sample in one line: true class, predicted class and probability."""
    said = f"true {shown.label}" if shown.label else "no label"
    if shown.prediction:
        chance = f" ({shown.probability:.2f})" if shown.probability == shown.probability else ""
        said += f"   predicted {shown.prediction}{chance}"
    return said


def scale_of(attribution: Tensor) -> float:
    """Return the largest absolute value of a map: the end of its colour scale."""
    return float(attribution.abs().max()) if attribution.numel() else 0.0


def bars(values: Tensor, side: int) -> Image.Image:
    """Draw a row's values as bars, the largest absolute ones first, blue for positive, orange for negative."""
    sheet = Image.new("RGB", (side, side), PAPER)
    pen = ImageDraw.Draw(sheet)
    flat = values.detach().cpu().double().flatten()
    order = flat.abs().argsort(descending=True)[:MOST_FEATURES].tolist()
    longest = max(float(flat.abs().max()), 1e-300)
    height = min(side / max(1, len(order)), 24)
    for place, index in enumerate(sorted(order) if len(flat) <= MOST_FEATURES else order):
        value, top = float(flat[index]), place * height
        length = abs(value) / longest * (side * 0.4)
        pen.text((2, top + height / 2), f"x{index}", INK, typeface(11), anchor="lm")
        start = side * 0.2
        pen.rectangle((start, top + 3, start + length, top + height - 3), POSITIVE if value > 0 else NEGATIVE)
        pen.text((start + length + 4, top + height / 2), f"{value:.2g}", INK, typeface(11), anchor="lm")
    return sheet


def tokens(words: Sequence[str], weights: Tensor | None, side: int) -> Image.Image:
    """Draw words in lines, each on a shade that tells its weight (in absolute value)."""
    sheet = Image.new("RGB", (side, side), PAPER)
    pen, font = ImageDraw.Draw(sheet), typeface(11)
    shades = [0.0] * len(words) if weights is None else (weights.abs() / max(scale_of(weights), 1e-300)).tolist()
    x, y = 2.0, 2.0
    for word, shade in zip(words, shades, strict=False):
        width = pen.textlength(word, font)
        if x + width > side and x > 2:
            x, y = 2.0, y + 16
        if y + 16 > side:
            pen.text((side - 14, side - 14), "…", INK, font)
            break
        background = tuple(int(255 - (255 - c) * 0.6 * shade) for c in POSITIVE)
        pen.rectangle((x - 1, y, x + width + 1, y + 14), background)
        pen.text((x, y), word, INK, font)
        x += width + 5
    return sheet


def _trouble(attribution: Tensor) -> str:
    if not bool(attribution.isfinite().all()):
        return "map holds NaN or infinity"
    return "map is zero everywhere" if scale_of(attribution) == 0 else ""


def _overlay(value: Any, attribution: Tensor, display: Display) -> Image.Image:
    heat = attribution.detach().cpu().double()
    heat = heat.abs().amax(0) if heat.ndim == 3 else heat.abs()
    shares = (heat / heat.max()).numpy()
    colours = colormaps["inferno"](shares)[..., :3]
    if display.show_inputs:
        grey = display.rgb(value).mean(2, keepdims=True)
        weight = 0.35 + 0.6 * shares[..., None]
        colours = weight * colours + (1 - weight) * (0.3 + 0.7 * grey)
    drawn = _fit(_to_pixels(colours), SIDE)
    return _beside([drawn, _colour_bar(float(heat.max()), max(48, drawn.height))], gap=4)


def _colour_bar(top: float, height: int) -> Image.Image:
    sheet = Image.new("RGB", (64, height), PAPER)
    ramp = colormaps["inferno"](np.linspace(1, 0, height - 16))[:, None, :3].repeat(12, 1)
    sheet.paste(Image.fromarray(_to_pixels(ramp)), (0, 8))
    pen = ImageDraw.Draw(sheet)
    pen.text((16, 8), f"{top:.2g}", INK, typeface(11), anchor="lm")
    pen.text((16, height - 8), "0", INK, typeface(11), anchor="lm")
    return sheet


def _noted(shown: Shown, note: str, display: Display, side: int, lines: int = 3) -> Image.Image:
    tile = picture(shown.value, display, side)
    sheet = Image.new("RGB", (side, side + 4 + 17 * lines), PAPER)
    sheet.paste(tile, ((side - tile.width) // 2, 0))
    pen = ImageDraw.Draw(sheet)
    for place, line in enumerate(note.split("\n")[:lines]):
        _written(pen, (side / 2, side + 4 + 17 * place), line, side, "ma")
    return sheet


def _written(pen: ImageDraw.ImageDraw, place: tuple[float, float], line: str, width: float, anchor: str) -> None:
    """Write a line in the largest type that fits, cut short with an ellipsis where none does."""
    font = next((f for f in map(typeface, (14, 13, 12, 11, 10)) if pen.textlength(line, f) <= width), typeface(10))
    while len(line) > 2 and pen.textlength(line, font) > width:
        line = line[:-2].rstrip() + "…"
    pen.text(place, line, INK, font, anchor=anchor)


def _captioned(lines: Sequence[str], body: Image.Image) -> Pixels:
    return np.asarray(_captioned_image(lines, body))


def _captioned_image(lines: Sequence[str], body: Image.Image) -> Image.Image:
    probe = ImageDraw.Draw(body)
    width = max(body.width, *(int(probe.textlength(line, typeface(CAPTION))) + 4 for line in lines))
    sheet = Image.new("RGB", (width, body.height + LINE * len(lines) + 4), PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, line in enumerate(lines):
        pen.text((2, LINE * place), line, INK, typeface(CAPTION))
    sheet.paste(body, (0, LINE * len(lines) + 4))
    return sheet


def _beside(images: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    sheet = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    x = 0
    for image in images:
        sheet.paste(image, (x, 0))
        x += image.width + gap
    return sheet


def _under(images: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    sheet = Image.new("RGB", (max(image.width for image in images), height), PAPER)
    y = 0
    for image in images:
        sheet.paste(image, (0, y))
        y += image.height + gap
    return sheet


def _fit(pixels: Pixels, side: int) -> Image.Image:
    """Scale so that the longer edge is `side`: whole pixels enlarged as squares, large images shrunk smoothly."""
    image = Image.fromarray(pixels)
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def _sheet_of_text(lines: Sequence[str], side: int) -> Image.Image:
    sheet = Image.new("RGB", (side, side), FAINT)
    pen = ImageDraw.Draw(sheet)
    for place, line in enumerate(lines):
        y = side / 2 + LINE * (place - (len(lines) - 1) / 2)
        _written(pen, (side / 2, y), line, side - 8, "mm")
    return sheet


def _to_pixels(colours: NDArray[np.float64]) -> Pixels:
    return (np.clip(colours, 0, 1) * 255).round().astype(np.uint8)


@cache
def typeface(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's own sans-serif face, which has the signs that captions need, in pixels."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)
