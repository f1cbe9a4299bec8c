"""Sheets: text and pictures put together."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE = 168

GAP = 8

LINE = 20

CAPTION = 15

INK, PAPER, FAINT = (20, 20, 20), (255, 255, 255), (225, 225, 225)

Pixels = NDArray[np.uint8]


def written(
    pen: ImageDraw.ImageDraw,
    place: tuple[float, float],
    line: str,
    width: float,
    anchor: str,
    ink: tuple[int, int, int] = INK,
    size: int = 14,
) -> None:
    """Write a line in the largest type up to `size` that fits, cut short with an ellipsis where none does."""
    fonts = map(typeface, range(size, 9, -1))
    font = next((f for f in fonts if pen.textlength(line, f) <= width), typeface(10))
    while len(line) > 2 and pen.textlength(line, font) > width:
        line = line[:-2].rstrip() + "…"
    pen.text(place, line, ink, font, anchor=anchor)


def captioned(lines: Sequence[str], body: Image.Image) -> Pixels:
    """Return an image under lines of text, as pixels."""
    return np.asarray(captioned_image(lines, body))


def captioned_image(lines: Sequence[str], body: Image.Image) -> Image.Image:
    """Return an image under lines of text."""
    probe = ImageDraw.Draw(body)
    width = max(body.width, *(int(probe.textlength(line, typeface(CAPTION))) + 4 for line in lines))
    sheet = Image.new("RGB", (width, body.height + LINE * len(lines) + 4), PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, line in enumerate(lines):
        pen.text((2, LINE * place), line, INK, typeface(CAPTION))
    sheet.paste(body, (0, LINE * len(lines) + 4))
    return sheet


def beside(images: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Return images in a row, their tops level."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    sheet = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    x = 0
    for image in images:
        sheet.paste(image, (x, 0))
        x += image.width + gap
    return sheet


def under(images: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Return images in a column, their left edges level."""
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    sheet = Image.new("RGB", (max(image.width for image in images), height), PAPER)
    y = 0
    for image in images:
        sheet.paste(image, (0, y))
        y += image.height + gap
    return sheet


def fit_into_square(pixels: Pixels, side: int) -> Image.Image:
    """Scale so that the longer edge is `side`: whole pixels enlarged as squares, large images shrunk smoothly."""
    image = Image.fromarray(pixels)
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def sheet_of_text(lines: Sequence[str], side: int) -> Image.Image:
    """Return a grey square with lines of text in its middle."""
    sheet = Image.new("RGB", (side, side), FAINT)
    pen = ImageDraw.Draw(sheet)
    for place, line in enumerate(lines):
        y = side / 2 + LINE * (place - (len(lines) - 1) / 2)
        written(pen, (side / 2, y), line, side - 8, "mm")
    return sheet


def to_pixels(colours: NDArray[np.float64]) -> Pixels:
    """Return colours `(H, W, 3)` in [0, 1] as 0 to 255."""
    return (np.clip(colours, 0, 1) * 255).round().astype(np.uint8)


@cache
def typeface(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's own sans-serif face, which has the signs that captions need, in pixels."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def render(figure: Figure) -> Pixels:
    """Return a figure's pixels `(height, width, 3)`, without pyplot's global state."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png(pixels: Pixels) -> bytes:
    """Return an image as a PNG file's content."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
