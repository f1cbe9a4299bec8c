"""The canvas: lines of text and images laid out on white sheets, and matplotlib figures, as pixels."""

from __future__ import annotations

import base64
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

# Of a sample or a map, in pixels: a panel of both, colour bar and classes then fits the 560 that a page gives it.
SIDE = 168
GAP = 8  # pixels between two images: enough to see where one ends
# The distance between lines of a caption, in pixels, and the size of its type, which leaves a quarter free.
LINE = 20
CAPTION_TYPE = 15
# Smaller letters are hard to read on a screen.
SMALLEST_TYPE = 10
INK, PAPER, FAINT = (20, 20, 20), (255, 255, 255), (225, 225, 225)

Pixels = NDArray[np.uint8]


def write_line(
    pen: ImageDraw.ImageDraw,
    position: tuple[float, float],
    line: str,
    width: float,
    anchor: str,
    ink: tuple[int, int, int] = INK,
    size: int = 14,
) -> None:
    """Write a line in the largest type up to `size` that fits; a line too long for the smallest ends in an ellipsis.

    Args:
        pen: draws on the sheet.
        position: x and y, of the point of the line that `anchor` names.
        line: of text.
        width: that it may take, in pixels.
        anchor: as Pillow names it, e.g. "la" for the left end of the top.
        ink: the colour.
        size: of the type, in pixels.
    """
    fonts = map(typeface, range(size, SMALLEST_TYPE - 1, -1))
    font = next((f for f in fonts if pen.textlength(line, f) <= width), typeface(SMALLEST_TYPE))
    while len(line) > 2 and pen.textlength(line, font) > width:
        line = line[:-2].rstrip() + "…"
    pen.text(position, line, ink, font, anchor=anchor)


def caption_above(lines: Sequence[str], body: Image.Image) -> Pixels:
    """Return an image with lines of text above it, as pixels."""
    return np.asarray(with_caption(lines, body))


def with_caption(lines: Sequence[str], body: Image.Image) -> Image.Image:
    """Return an image with lines of text above it."""
    pen = ImageDraw.Draw(body)  # only measures
    width = max(body.width, *(int(pen.textlength(line, typeface(CAPTION_TYPE))) + 4 for line in lines))
    sheet = Image.new("RGB", (width, body.height + LINE * len(lines) + 4), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, line in enumerate(lines):
        pen.text((2, LINE * index), line, INK, typeface(CAPTION_TYPE))
    sheet.paste(body, (0, LINE * len(lines) + 4))
    return sheet


def side_by_side(images: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Return images in a row, aligned at their tops."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    sheet = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    x = 0
    for image in images:
        sheet.paste(image, (x, 0))
        x += image.width + gap
    return sheet


def stacked(images: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Return images in a column, aligned at their left edges."""
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    sheet = Image.new("RGB", (max(image.width for image in images), height), PAPER)
    y = 0
    for image in images:
        sheet.paste(image, (0, y))
        y += image.height + gap
    return sheet


def fit_into_square(pixels: Pixels, side: int) -> Image.Image:
    """Scale an image so that its longer edge is `side`; enlarged pixels stay squares, large images shrink smoothly."""
    image = Image.fromarray(pixels)
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def text_square(lines: Sequence[str], side: int) -> Image.Image:
    """Return a grey square with lines of text at its centre."""
    sheet = Image.new("RGB", (side, side), FAINT)
    pen = ImageDraw.Draw(sheet)
    for index, line in enumerate(lines):
        y = side / 2 + LINE * (index - (len(lines) - 1) / 2)
        write_line(pen, (side / 2, y), line, side - 8, "mm")
    return sheet


def to_pixels(colours: NDArray[np.float64]) -> Pixels:
    """Return colours `(H, W, 3)` in [0, 1] as whole numbers from 0 to 255."""
    return (np.clip(colours, 0, 1) * 255).round().astype(np.uint8)


@cache
def typeface(size: int) -> ImageFont.FreeTypeFont:
    """Return the typeface that comes with matplotlib, which has the signs of captions (✗, −, …); size in pixels."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def render(figure: Figure) -> Pixels:
    """Return a figure's pixels `(height, width, 3)`, without pyplot's global state."""
    figure_canvas = FigureCanvasAgg(figure)
    figure_canvas.draw()
    return np.asarray(figure_canvas.buffer_rgba())[..., :3].copy()


def png(pixels: Pixels) -> bytes:
    """Return an image as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def inline(picture: bytes) -> str:
    """Return a PNG as a `data:` address, which holds all of it."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()
