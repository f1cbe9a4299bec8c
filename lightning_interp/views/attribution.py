"""A sample beside its attribution maps, and the film of them over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_interp.data.batch import main_tensor
from lightning_interp.views.canvas import (
    INK,
    PAPER,
    SIDE,
    Pixels,
    beside,
    captioned,
    captioned_image,
    fit_into_square,
    sheet_of_text,
    to_pixels,
    typeface,
    under,
    written,
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

FRAME = 112
MOST_WORDS = 28
FAINTEST = 1e-6


class TitledMap(NamedTuple):
    """A map and what to write over it.

    Args:
        title: the class that it explains, or the moment.
        map: signed: in the input's shape `(C, H, W)`, `(H, W)`, `(tokens,)` or `(columns,)`.
    """

    title: str
    map: Tensor


def attribution_panel(view: SampleView, maps: Sequence[TitledMap], title: str, display: Display, top: float) -> Pixels:
    """Draw a sample beside its maps and its likeliest classes, with their probabilities.

    An image gets each map as an overlay: bright for the largest absolute value over channels, or blue for positive
    and orange for negative where the map has no channels and both signs; a table bars, tokens a shade each. A map that
    is zero or negative everywhere, or not finite, is said to be so instead of being drawn.

    Args:
        view: the sample.
        maps: one, or one per class, each with its class in words.
        title: method, layer and moment.
        display: how samples are shown.
        top: the value at the end of the colour scale.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    kind = kind_of(view.value)
    signed = _signed([one.map for one in maps])
    drawn = [_drawn(view.value, one.map, display, top, signed, SIDE) for one in maps]
    if len(maps) > 1:
        drawn = [captioned_image([one.title], body) for one, body in zip(maps, drawn, strict=True)]
    scale = [_colour_bar(top, signed, max(48, drawn[0].height))] if kind == "image" else []
    classes = [_likeliest(view)] if view.likeliest else []
    peaks = ", ".join(f"{scale_of(one.map):.2g}" for one in maps)
    caption = [f"#{view.id}   {verdict(view)}", title, f"largest {peaks}, full colour at {top:.2g}"]
    left = picture(view.value, display)
    if kind == "table" and display.show_inputs and maps[0].map.ndim == 1:
        left = bars(
            main_tensor(view.value), SIDE, order=largest(maps[0].map), name=display.column
        )  # the columns that the map's bars are of
    return captioned(caption, beside([left, *drawn, *scale, *classes]))


def film(view: SampleView, frames: Sequence[TitledMap], title: str, display: Display) -> Pixels:
    """Draw one sample's maps at several moments in a row, all on one colour scale.

    Maps of images are overlays; those of tokens and tables a cell for each token or column and moment.

    Args:
        view: the sample, as it is answered at the end.
        frames: the maps, each with its moment in words.
        title: method and class.
        display: how samples are shown.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    top = max([scale_of(frame.map) for frame in frames if not trouble(frame.map)], default=0.0)
    caption = [f"#{view.id}   {verdict(view)}", f"{title}; one colour scale, full colour at {top:.2g}"]
    if kind_of(view.value) == "image":
        signed = _signed([frame.map for frame in frames])
        drawn = [_frame(view.value, frame, display, top, signed) for frame in frames]
        return captioned(caption, beside([picture(view.value, display, FRAME), *drawn]))
    names = _names(view.value, len(frames[0].map), display)
    return captioned(caption, beside([picture(view.value, display, SIDE), _cells(names, frames, top)]))


def trouble(attribution: Tensor) -> str:
    """Say what keeps a map from being drawn; empty if nothing does."""
    if not bool(attribution.isfinite().all()):
        return "map holds NaN or infinity"
    if scale_of(attribution) == 0:
        return "map is zero everywhere"
    if attribution.ndim < 3 and float(attribution.max()) < 0:
        return f"map is negative everywhere, at most {float(attribution.max()):.2g}"
    return ""


def _signed(maps: Sequence[Tensor]) -> bool:
    """Say whether maps without channels have both signs, so that each sign gets a colour."""
    return any(one.ndim == 2 and float(one.min()) < 0 for one in maps if not trouble(one))


def _drawn(value: Any, attribution: Tensor, display: Display, top: float, signed: bool, side: int) -> Image.Image:
    kind = kind_of(value)
    if why := trouble(attribution):
        return sheet_of_text([why], side)
    if kind == "image":
        return fit_into_square(_overlay(value, attribution, display, top, signed), side)
    if not display.show_inputs:
        return sheet_of_text(["not shown"], side)
    if kind == "table" and attribution.ndim == 1:
        return bars(attribution, side, top, name=display.column)
    if attribution.ndim != 1:
        return sheet_of_text([f"map of shape {tuple(attribution.shape)}", "is not drawn"], side)
    return tokens(display.words(main_tensor(value)), attribution, side, top)


def _overlay(value: Any, attribution: Tensor, display: Display, top: float, signed: bool) -> Pixels:
    """Return a map's colours over the grey image, at the image's size."""
    size = main_tensor(value).shape[-2:]
    heat = attribution.detach().cpu().double()
    heat = heat.abs().amax(0) if heat.ndim == 3 else heat
    if heat.ndim == 1:  # of a series: the same for all its channels
        heat = heat.expand(size) if len(heat) == size[-1] else heat[:, None].expand(size)
    if heat.shape != size:
        heat = F.interpolate(heat[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    shares = (heat / max(top, FAINTEST * scale_of(heat))).clamp(-1, 1).numpy()
    colours = _both_signs(shares) if signed else colormaps["inferno"](shares)[..., :3]
    if display.show_inputs:
        grey = display.rgb(value).mean(2, keepdims=True)
        weight = 0.35 + 0.6 * np.abs(shares)[..., None]
        colours = weight * colours + (1 - weight) * (0.3 + 0.7 * grey)
    return to_pixels(colours)


def _both_signs(shares: Any) -> Any:
    """Return white for 0, blue towards 1, orange towards −1."""
    ends = np.where(shares[..., None] > 0, np.array(POSITIVE), np.array(NEGATIVE)) / 255
    return 1 - (1 - ends) * np.abs(shares)[..., None]


def _colour_bar(top: float, signed: bool, height: int) -> Image.Image:
    sheet = Image.new("RGB", (56, height), PAPER)
    shares = np.linspace(1, -1 if signed else 0, height - 16)
    colours = _both_signs(shares) if signed else colormaps["inferno"](shares)[:, :3]
    sheet.paste(Image.fromarray(to_pixels(colours[:, None].repeat(12, 1))), (0, 8))
    pen = ImageDraw.Draw(sheet)
    pen.text((16, 8), f"{top:.2g}", INK, typeface(11), anchor="lm")
    pen.text((16, height - 8), f"−{top:.2g}" if signed else "0", INK, typeface(11), anchor="lm")
    return sheet


def _likeliest(view: SampleView, width: int = 116) -> Image.Image:
    """Draw the likeliest classes, a bar for each one's probability."""
    sheet = Image.new("RGB", (width, 34 * len(view.likeliest) + 4), PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, (name, chance) in enumerate(view.likeliest):
        y = 34 * place
        written(pen, (0, y), f"{name}: {chance:.2f}", width, "la")
        pen.rectangle((0, y + 18, max(1, int((width - 1) * chance)), y + 27), POSITIVE)
    return sheet


def _frame(value: Any, frame: TitledMap, display: Display, top: float, signed: bool) -> Image.Image:
    body = _drawn(value, frame.map, display, top, signed, FRAME)
    note = Image.new("RGB", (FRAME, 16), PAPER)
    written(ImageDraw.Draw(note), (0, 0), "" if trouble(frame.map) else f"{scale_of(frame.map):.2g}", FRAME, "la")
    return captioned_image([frame.title], under([body, note], gap=2))


def _cells(names: Sequence[str], frames: Sequence[TitledMap], top: float) -> Image.Image:
    """Draw a cell for each token or column (down) and moment (across)."""
    label, cell, row = 110, 26, 16
    sheet = Image.new("RGB", (label + cell * len(frames), row * (len(names) + 1) + 2), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, frame in enumerate(frames):
        x = label + cell * column
        written(pen, (x + cell / 2, 0), frame.title.split()[-1], cell, "ma")
        for place, value in enumerate(frame.map.tolist()[: len(names)]):
            y = row * (place + 1)
            pen.rectangle((x + 1, y, x + cell - 1, y + row - 2), shade_of(value / max(top, FAINTEST)))
    for place, name in enumerate(names):
        written(pen, (0, row * (place + 1)), name, label - 4, "la")
    return sheet


def _names(value: Any, count: int, display: Display) -> list[str]:
    """Return the names of tokens or columns that are drawn, as many as there is room for."""
    shown = min(count, MOST_WORDS)
    if kind_of(value) == "tokens" and display.show_inputs:
        return display.words(main_tensor(value))[:shown]
    return [f"token{i}" if kind_of(value) == "tokens" else display.column(i) for i in range(shown)]
