"""Values as colours, and the bar beside a map that says which colour is which value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Colormap
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw

from lightning_interp.views.canvas import GAP, INK, PAPER, Pixels, paragraph, typeface

# The size of type of names, titles and numbers at the bar, in pixels.
TITLE_TYPE = 16
# Of the bar, in pixels: its width, the height of a pointed end, the length of a tick.
BAR, POINTED_END, TICK = 20, 14, 5
# Numbers at the bar: with this many intervals at most they stay apart on the lowest map.
MOST_INTERVALS = 6


@dataclass(frozen=True)
class ColourScale:
    """Colours from dark purple to yellow; values below the scale are black, values above it have its last colour.

    Args:
        low: the value at the dark end.
        top: the value at the bright end.
        reverse: whether the dark end is at `top`, as for distances.
    """

    low: float
    top: float
    reverse: bool = False

    def colours(self, values: np.ma.MaskedArray) -> Pixels:
        """Return the colours of values, `(..., 3)`."""
        return _colour_map(self.reverse)((values - self.low) / (self.top - self.low), bytes=True)[..., :3]

    def is_light(self, value: float) -> bool:
        """Whether black letters are easier to read on the value's colour than white ones."""
        split = self.low + 0.6 * (self.top - self.low)
        return self.low <= value < split if self.reverse else value >= split

    def bar(self, height: int, values: np.ma.MaskedArray, label: str) -> Image.Image:
        """Draw the scale upright: with an end pointed where values lie outside, ticks, numbers and a label.

        Args:
            height: of the bar, in pixels; half a line of numbers is added above and below.
            values: of the map.
            label: what the values mean.
        """
        font, ticks = typeface(TITLE_TYPE), self._ticks()
        text = paragraph(label, TITLE_TYPE, height, centred=True).transpose(Image.Transpose.ROTATE_90)
        numbers_left = BAR + TICK + 3
        text_left = numbers_left + GAP + ceil(max(map(font.getlength, ticks.values()), default=0))
        sheet = Image.new("RGB", (text_left + text.width, max(height + 2 * GAP, text.height)), PAPER)
        sheet.paste(text, (text_left, max(0, GAP + (height - text.height) // 2)))
        first, last = self._draw_bar(sheet, height, values)
        pen = ImageDraw.Draw(sheet)
        for tick, number in ticks.items():
            y = round(last + (first - last) * (tick - self.low) / (self.top - self.low))
            pen.line(((BAR, y), (BAR + TICK, y)), INK)
            pen.text((numbers_left, y), number, INK, font, anchor="lm")
        return sheet

    def _ticks(self) -> dict[float, str]:
        """Return round values on the scale, and each as text."""
        ticks = MaxNLocator(MOST_INTERVALS, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.top)
        # Adding 0.0 turns -0.0 into 0.0.
        return {float(tick): f"{tick + 0.0:.6g}" for tick in ticks if self.low <= tick <= self.top}

    def _draw_bar(self, sheet: Image.Image, height: int, values: np.ma.MaskedArray) -> tuple[int, int]:
        """Draw the bar, GAP below the sheet's top, and return the heights of its bright and dark end."""
        pen = ImageDraw.Draw(sheet)
        below, above = bool((values < self.low).any()), bool((values > self.top).any())
        first, last = GAP + POINTED_END * above, GAP + height - 1 - POINTED_END * below
        column = self.colours(np.ma.asarray(np.linspace(self.top, self.low, last - first + 1)))
        sheet.paste(Image.fromarray(column[:, None]).resize((BAR, len(column))), (0, first))
        pen.rectangle((0, first, BAR, last), outline=INK)
        span = self.top - self.low
        ends = ((above, first, GAP, self.top + span), (below, last, GAP + height - 1, self.low - span))
        for pointed, edge, tip, value_outside in ends:
            if pointed:
                (colour,) = self.colours(np.ma.asarray([value_outside]))
                pen.polygon(((0, edge), (BAR // 2, tip), (BAR, edge)), tuple(colour.tolist()), INK)
        return first, last


@cache
def _colour_map(reverse: bool) -> Colormap:
    return colormaps["viridis_r" if reverse else "viridis"].with_extremes(under="black")
