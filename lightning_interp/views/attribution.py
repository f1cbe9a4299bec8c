"""Panels: a sample beside its attribution maps. Films: its maps over the epochs, in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_interp.data.batch import main_tensor
from lightning_interp.views.canvas import (
    FAINT,
    INK,
    PAPER,
    SIDE,
    Pixels,
    caption_above,
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
from lightning_interp.views.sample import (
    NEGATIVE,
    POSITIVE,
    bars,
    largest,
    picture,
    scale_of,
    shade_of,
    tokens,
    verdict,
)

# The side of a map in a film, in pixels: two thirds of a panel's, so that a dozen epochs fit a wide screen.
FRAME_SIDE = 112
# The rows of a film of tokens or columns: about as high as the panel of an image.
MOST_ROWS_IN_FILM = 28
# The least scale of a map's colours, as a share of its own largest value, where others have a scale far smaller.
SMALLEST_SCALE = 1e-6


class TitledMap(NamedTuple):
    """A map and the line of text above it.

    Args:
        title: the class that the map explains, or when it was computed.
        map: signed, in the input's shape `(C, H, W)`, `(H, W)`, `(tokens,)` or `(columns,)`.
    """

    title: str
    map: Tensor


def attribution_panel(view: SampleView, maps: Sequence[TitledMap], title: str, display: Display, top: float) -> Pixels:
    """Draw a sample beside its maps and its likeliest classes, with their probabilities.

    An image gets each map as an overlay: bright for the largest absolute value over channels, or blue for positive
    and orange for negative where the map has no channels and both signs. A table gets bars, tokens a shade each. In
    place of a map that is zero or negative everywhere, or not finite, stands that reason.

    Args:
        view: the sample.
        maps: one, or one per class, each with its class in words.
        title: method, layer and epoch.
        display: how samples are shown.
        top: the value at the end of the colour scale.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    kind = kind_of(view.value)
    signed = _has_both_signs([titled.map for titled in maps])
    images = [_draw_map(view.value, titled.map, display, top, signed, SIDE) for titled in maps]
    if len(maps) > 1:
        images = [with_caption([titled.title], body) for titled, body in zip(maps, images, strict=True)]
    scale = [_colour_bar(top, signed, max(48, images[0].height))] if kind == "image" else []
    classes = [_class_bars(view)] if view.likeliest else []
    peaks = ", ".join(f"{scale_of(titled.map):.2g}" for titled in maps)
    caption = [f"#{view.id}   {verdict(view)}", title, f"largest {peaks}, full colour at {top:.2g}"]
    left = picture(view.value, display)
    if kind == "table" and display.show_inputs and maps[0].map.ndim == 1:
        # The same columns as those of the map, so that a value stands beside its attribution.
        left = bars(main_tensor(view.value), SIDE, order=largest(maps[0].map), name=display.column)
    return caption_above(caption, side_by_side([left, *images, *scale, *classes]))


def film(view: SampleView, frames: Sequence[TitledMap], title: str, display: Display) -> Pixels:
    """Draw one sample's maps at several epochs in a row, all on one colour scale.

    Maps of images are overlays; those of tokens and tables have a cell for each token or column and epoch.

    Args:
        view: the sample, with the final network's prediction.
        frames: the maps, each with its epoch in words.
        title: method and class.
        display: how samples are shown.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    top = max([scale_of(frame.map) for frame in frames if not reason_not_drawn(frame.map)], default=0.0)
    caption = [f"#{view.id}   {verdict(view)}", f"{title}; one colour scale, full colour at {top:.2g}"]
    if kind_of(view.value) == "image":
        signed = _has_both_signs([frame.map for frame in frames])
        images = [_film_frame(view.value, frame, display, top, signed) for frame in frames]
        return caption_above(caption, side_by_side([picture(view.value, display, FRAME_SIDE), *images]))
    names = _row_names(view.value, len(frames[0].map), display)
    return caption_above(caption, side_by_side([picture(view.value, display, SIDE), _cell_grid(names, frames, top)]))


def reason_not_drawn(attribution: Tensor) -> str:
    """Return why a map is not drawn; empty if it can be."""
    if not bool(attribution.isfinite().all()):
        return "map holds NaN or infinity"
    if scale_of(attribution) == 0:
        return "map is zero everywhere"
    if attribution.ndim < 3 and float(attribution.max()) < 0:
        return f"map is negative everywhere, at most {float(attribution.max()):.2g}"
    return ""


def _has_both_signs(maps: Sequence[Tensor]) -> bool:
    """Say whether some map without channels has negative values, so that each sign gets a colour."""
    drawable = [attribution for attribution in maps if not reason_not_drawn(attribution)]
    return any(attribution.ndim == 2 and float(attribution.min()) < 0 for attribution in drawable)


def _draw_map(value: Any, attribution: Tensor, display: Display, top: float, signed: bool, side: int) -> Image.Image:
    kind = kind_of(value)
    if reason := reason_not_drawn(attribution):
        return text_square([reason], side)
    if kind == "image":
        return fit_into_square(_overlay(value, attribution, display, top, signed), side)
    if not display.show_inputs:
        return text_square(["not shown"], side)
    if kind == "table" and attribution.ndim == 1:
        return bars(attribution, side, top, name=display.column)
    if attribution.ndim != 1:
        return text_square([f"map of shape {tuple(attribution.shape)}", "is not drawn"], side)
    return tokens(display.words(main_tensor(value)), attribution, side, top)


def _overlay(value: Any, attribution: Tensor, display: Display, top: float, signed: bool) -> Pixels:
    """Return the colours of a map laid over the grey image, at the image's size."""
    size = main_tensor(value).shape[-2:]
    heat = attribution.detach().cpu().double()
    heat = heat.abs().amax(0) if heat.ndim == 3 else heat
    if heat.ndim == 1:  # the map of a series is repeated for all its channels
        heat = heat.expand(size) if len(heat) == size[-1] else heat[:, None].expand(size)
    if heat.shape != size:
        heat = F.interpolate(heat[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    shares = (heat / max(top, SMALLEST_SCALE * scale_of(heat))).clamp(-1, 1).numpy()
    colours = _signed_colours(shares) if signed else colormaps["inferno"](shares)[..., :3]
    if display.show_inputs:
        grey = display.rgb(value).mean(2, keepdims=True)
        weight = 0.35 + 0.6 * np.abs(shares)[..., None]
        colours = weight * colours + (1 - weight) * (0.3 + 0.7 * grey)
    return to_pixels(colours)


def _signed_colours(shares: Any) -> Any:
    """Return colours from orange at −1 over white at 0 to blue at 1."""
    ends = np.where(shares[..., None] > 0, np.array(POSITIVE), np.array(NEGATIVE)) / 255
    return 1 - (1 - ends) * np.abs(shares)[..., None]


def _colour_bar(top: float, signed: bool, height: int) -> Image.Image:
    sheet = Image.new("RGB", (56, height), PAPER)
    shares = np.linspace(1, -1 if signed else 0, height - 16)
    colours = _signed_colours(shares) if signed else colormaps["inferno"](shares)[:, :3]
    sheet.paste(Image.fromarray(to_pixels(colours[:, None].repeat(12, 1))), (0, 8))
    pen = ImageDraw.Draw(sheet)
    pen.text((16, 8), f"{top:.2g}", INK, typeface(11), anchor="lm")
    pen.text((16, height - 8), f"−{top:.2g}" if signed else "0", INK, typeface(11), anchor="lm")
    return sheet


def _class_bars(view: SampleView, width: int = 116) -> Image.Image:
    """Draw the likeliest classes, each with a bar for its probability."""
    sheet = Image.new("RGB", (width, 34 * len(view.likeliest) + 4), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (name, probability) in enumerate(view.likeliest):
        y = 34 * index
        write_line(pen, (0, y), f"{name}: {probability:.2f}", width, "la")
        pen.rectangle((0, y + 18, max(1, int((width - 1) * probability)), y + 27), POSITIVE)
    return sheet


def _film_frame(value: Any, frame: TitledMap, display: Display, top: float, signed: bool) -> Image.Image:
    body = _draw_map(value, frame.map, display, top, signed, FRAME_SIDE)
    note = Image.new("RGB", (FRAME_SIDE, 16), PAPER)
    largest_value = "" if reason_not_drawn(frame.map) else f"{scale_of(frame.map):.2g}"
    write_line(ImageDraw.Draw(note), (0, 0), largest_value, FRAME_SIDE, "la")
    return with_caption([frame.title], stacked([body, note], gap=2))


def _cell_grid(names: Sequence[str], frames: Sequence[TitledMap], top: float) -> Image.Image:
    """Draw a cell for each token or column (downwards) and epoch (across); grey where a value is not finite."""
    label, cell, height = 110, 26, 16
    sheet = Image.new("RGB", (label + cell * len(frames), height * (len(names) + 1) + 2), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, frame in enumerate(frames):
        x = label + cell * column
        write_line(pen, (x + cell / 2, 0), frame.title.split()[-1], cell, "ma")
        scale = max(top, SMALLEST_SCALE * scale_of(frame.map)) or 1.0
        for row, value in enumerate(frame.map.tolist()[: len(names)]):
            y = height * (row + 1)
            colour = shade_of(value / scale) if math.isfinite(value) else FAINT
            pen.rectangle((x + 1, y, x + cell - 1, y + height - 2), colour)
    for row, name in enumerate(names):
        write_line(pen, (0, height * (row + 1)), name, label - 4, "la")
    return sheet


def _row_names(value: Any, count: int, display: Display) -> list[str]:
    """Return the names of the tokens or columns that are drawn, `MOST_ROWS_IN_FILM` at most."""
    count_drawn = min(count, MOST_ROWS_IN_FILM)
    if kind_of(value) == "tokens" and display.show_inputs:
        return display.words(main_tensor(value))[:count_drawn]
    return [f"token{i}" if kind_of(value) == "tokens" else display.column(i) for i in range(count_drawn)]
