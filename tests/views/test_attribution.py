"""A sample beside its maps, and the film of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_interp import Display
from lightning_interp.views.attribution import FRAME_SIDE, TitledMap, attribution_panel, film, reason_not_drawn
from lightning_interp.views.canvas import GAP, LINE, SIDE
from lightning_interp.views.display import SampleView
from lightning_interp.views.sample import NEGATIVE, POSITIVE


@pytest.mark.parametrize(
    ("value", "attribution"),
    [
        (torch.rand(1, 8, 8), torch.randn(1, 8, 8)),
        (torch.rand(3, 20, 10), torch.rand(20, 10)),
        (torch.randn(30), torch.randn(30)),
        (torch.randn(3, 40), torch.randn(3, 40)),
        (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)),
        (torch.arange(40), torch.rand(40)),
        ({"ids": torch.arange(4), "mask": torch.ones(4, dtype=torch.long)}, torch.rand(4)),
    ],
)
def test_panels_of_every_kind(value: object, attribution: torch.Tensor) -> None:
    shown = SampleView("7", value, "cat", "dog", 0.75)
    pixels = attribution_panel(shown, [TitledMap("dog", attribution)], "Saliency of dog", Display(), 1.0)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.std() > 5


def overlay_of(attribution: Tensor, top: float) -> np.ndarray:
    shown = SampleView("7", torch.zeros(1, 8, 8), "a", "b")
    pixels = attribution_panel(shown, [TitledMap("", attribution)], "t", Display(), top)
    caption, left = 3 * LINE + 4, SIDE + GAP
    return pixels[caption : caption + SIDE, left : left + SIDE].astype(float)


def test_the_brightest_pixel_is_where_the_map_is_largest_in_absolute_value() -> None:
    attribution = torch.full((1, 8, 8), 0.1)
    attribution[0, 2, 5] = -1.0
    bright = overlay_of(attribution, 1.0).sum(2)
    row, column = np.unravel_index(bright.argmax(), bright.shape)
    assert (row * 8 // SIDE, column * 8 // SIDE) == (2, 5)


def test_the_colours_are_shares_of_the_given_scale() -> None:
    attribution = torch.rand(1, 8, 8)
    assert np.array_equal(overlay_of(attribution, 1.0), overlay_of(attribution * 1e-6, 1e-6))
    dark, bright = overlay_of(attribution, 10.0), overlay_of(attribution, 1.0)
    assert dark.sum() < bright.sum()


def test_each_sign_has_its_colour_where_a_map_has_both() -> None:
    attribution = torch.zeros(8, 8)
    attribution[1, 1], attribution[6, 6] = 1.0, -1.0
    pixels = overlay_of(attribution, 1.0)
    half, step = SIDE // 16, SIDE // 8
    for place, colour in ((1, POSITIVE), (6, NEGATIVE)):
        found = pixels[place * step + half, place * step + half]
        assert np.argmax(found) == np.argmax(colour)


@pytest.mark.parametrize(
    ("attribution", "said"),
    [
        (torch.zeros(8, 8), "zero everywhere"),
        (torch.full((8, 8), torch.nan), "NaN"),
        (torch.full((8, 8), -0.3), "negative everywhere, at most -0.3"),
        (torch.full((3, 8, 8), -0.3), ""),
        (torch.rand(8, 8), ""),
    ],
)
def test_a_map_without_content_is_said_to_be_so(attribution: Tensor, said: str) -> None:
    assert (said in reason_not_drawn(attribution)) if said else reason_not_drawn(attribution) == ""
    if said:
        colours = np.unique(overlay_of(attribution, 1.0).reshape(-1, 3), axis=0)
        assert (colours.max(1) - colours.min(1) == 0).all()


def test_private_inputs_are_not_shown() -> None:
    value = torch.rand(1, 8, 8)
    shown = [SampleView("7", v, "a", "b") for v in (value, 1 - value)]
    display = Display(show_inputs=False)
    assert np.array_equal(*(attribution_panel(s, [TitledMap("", value)], "t", display, 1.0) for s in shown))
    assert np.array_equal(*(film(s, [TitledMap("epoch 1", value[0])], "t", display) for s in shown))
    ids = [SampleView("7", torch.arange(4) + k, "a", "b") for k in (0, 1)]
    maps = [TitledMap("epoch 1", torch.rand(4))]
    assert np.array_equal(*(attribution_panel(s, maps, "t", display, 1.0) for s in ids))
    assert np.array_equal(*(film(s, maps, "t", display) for s in ids))


def test_a_film_shows_all_moments_on_the_scale_of_the_largest() -> None:
    shown = SampleView("7", torch.zeros(1, 8, 8), "a", "b")
    weak, strong = TitledMap("epoch 1", torch.full((8, 8), 0.1)), TitledMap("epoch 2", torch.ones(8, 8))
    pixels = film(shown, [weak, strong], "t", Display()).astype(float)
    top = 2 * LINE + 4 + LINE + 4  # below the caption and the frames' titles
    first, second = (
        pixels[top : top + FRAME_SIDE, x : x + FRAME_SIDE] for x in (FRAME_SIDE + GAP, 2 * (FRAME_SIDE + GAP))
    )
    assert first.sum() < second.sum()
    alone = film(shown, [weak], "t", Display()).astype(float)
    assert alone[top : top + FRAME_SIDE, FRAME_SIDE + GAP : 2 * FRAME_SIDE + GAP].sum() > first.sum()


def test_a_film_of_tokens_depends_on_shares_alone_and_survives_a_map_that_is_not_finite() -> None:
    view, values = SampleView("7", torch.arange(6), "a", "b"), torch.tensor([0.0, 0.2, -1.0, 0.5, 0.1, 0.0])
    caption = 2 * LINE + 4  # holds the scale in numbers
    small, large = (film(view, [TitledMap("epoch 1", scale * values)], "t", Display()) for scale in (1e-9, 1.0))
    assert np.array_equal(small[caption:], large[caption:])
    broken = [TitledMap("epoch 1", torch.full((6,), torch.nan)), TitledMap("epoch 2", values)]
    assert film(view, broken, "t", Display()).std() > 5


@pytest.mark.parametrize("value", [torch.arange(6), torch.randn(6)])
def test_films_of_tokens_and_tables_have_a_cell_for_each_moment(value: Tensor) -> None:
    values = torch.zeros(6)
    values[2] = 1.0
    frames = [TitledMap("epoch 1", torch.zeros(6)), TitledMap("epoch 2", values)]
    pixels = film(SampleView("7", value, "a", "b"), frames, "t", Display())
    blue = np.argwhere(pixels[:, SIDE + GAP :, 2].astype(int) - pixels[:, SIDE + GAP :, 0] > 40)
    assert len(blue) > 50
    assert blue[:, 1].min() >= 110 + 26  # of the second moment alone
