"""What a reader is shown, pixel by pixel where it matters."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_interp import Display
from lightning_interp.data.batch import main_tensor
from lightning_interp.similarity.results import SimilarityMap
from lightning_interp.views import heat_map as heat_map_module
from lightning_interp.views.canvas import GAP, INK, png
from lightning_interp.views.colour_scale import ColourScale
from lightning_interp.views.display import SampleView, kind_of
from lightning_interp.views.heat_map import heat_map
from lightning_interp.views.sample import gallery


def test_labels() -> None:
    display = Display(class_names=["cat", "dog"])
    assert display.label(torch.tensor(1)) == "dog"
    assert display.label(torch.tensor(7)) == "7"
    assert display.label(torch.tensor([1, 1])) == "cat, dog"
    assert display.label(torch.tensor([0.0, 0.0])) == "none"
    assert display.label(torch.ones(9)) == "cat, dog, 2, 3, …"
    assert display.label(torch.ones(64, 64)) == "of shape (64, 64)"
    assert display.label(torch.tensor(0.25)) == "0.25"
    assert display.label(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])) == "(0.1, 0.2, 0.3, 0.4, …)"
    assert Display(sample_id=lambda i: f"img/{i}.png").id(3) == "img/3.png"


def test_unnormalisation() -> None:
    image = torch.rand(3, 4, 4)
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    sent = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert np.allclose(Display(mean=mean, std=std).rgb(sent), image.permute(1, 2, 0), atol=1e-6)
    assert np.allclose(Display().rgb(image), image.permute(1, 2, 0), atol=1e-6)
    assert np.allclose(Display().rgb(image * 255), image.permute(1, 2, 0), atol=1e-6)
    stretched = Display().rgb(sent)
    assert (stretched.min(), stretched.max()) == (0, 1)
    assert Display().rgb(torch.rand(12, 5, 6)).shape == (5, 6, 3)
    assert Display().rgb(torch.rand(5, 6)).shape == (5, 6, 3)


def test_kinds() -> None:
    assert kind_of({"ids": torch.zeros(3, dtype=torch.long), "x": torch.zeros(1, 8, 8)}) == "image"
    assert kind_of(torch.zeros(20, 16)) == "image"
    assert kind_of(torch.zeros(1, 30)) == "table"
    assert kind_of(torch.zeros(2, 3, 4, 5)) == "other"
    with pytest.raises(ValueError, match="at least one tensor"):
        main_tensor(("a", "b"))


def test_private_inputs_are_not_shown() -> None:
    value = torch.rand(1, 8, 8)
    shown = [SampleView("7", v, "a", "b") for v in (value, 1 - value)]
    display = Display(show_inputs=False)
    galleries = [gallery(s, "note", [("Helpful", [(s, "x")])], display) for s in shown]
    assert np.array_equal(*galleries)


def test_heat_maps() -> None:
    values = torch.tensor([[1.0, 0.2], [torch.nan, 0.0]])
    table = SimilarityMap("CKA", "to the end", ("conv", "fc"), ("0", "1"), values, "layer", "epoch", 512, "be careful")
    pixels = heat_map(table)
    assert pixels.ndim == 3
    assert pixels.dtype == np.uint8
    yellow, purple = (253, 231, 37), (68, 1, 84)
    for colour in (yellow, purple):
        assert (np.abs(pixels.astype(int) - colour).max(2) < 3).sum() > 500
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="mean and std together"):
        Display(mean=0.5)
    with pytest.raises(TypeError, match="decode"):
        Display(decode="words")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="list of names"):
        Display(class_names="cat")


def test_the_main_tensor() -> None:
    ids, mask, x = torch.arange(6).view(2, 3), torch.ones(2, 3), torch.randn(2, 5)
    assert main_tensor({"attention_mask": mask, "idx": torch.arange(2), "input_ids": ids}, lead=1) is ids
    assert main_tensor({"attention_mask": mask.long(), "input_ids": ids}, lead=1) is ids
    assert main_tensor({"categories": ids, "numbers": x, "weight": torch.rand(2)}, lead=1) is x
    assert main_tensor((x[:, :2], x)) is x
    assert main_tensor({"mask": mask}) is mask


def test_a_long_label_is_cut_and_stays_inside() -> None:
    shown = SampleView("7", torch.zeros(1, 8, 8), "a", "b")
    long = gallery(shown, "x" * 400, [("Helpful", [(shown, "y" * 400)])], Display())
    short = gallery(shown, "x", [("Helpful", [(shown, "y")])], Display())
    assert long.shape == short.shape


def test_column_names_stay_on_the_picture() -> None:
    names = tuple(f"model.encoder.layer{i}.attention" for i in range(6))
    table = SimilarityMap("CKA", "final", names, names, torch.eye(6), "layer", "layer", 8)
    edge = np.concatenate([heat_map(table)[:2].ravel(), heat_map(table)[:, :2].ravel()])
    assert (edge == 255).all()


def test_the_range_of_colours_fits_the_measure() -> None:
    values = np.ma.masked_invalid(np.array([[-3.0, 40.0]]))

    def ranged(**kind: bool) -> tuple[float, float]:
        table = SimilarityMap("m", "t", ("a",), ("b", "c"), torch.tensor(values.filled()), "r", "c", 8, **kind)
        return heat_map_module._colour_range(table, values)

    assert ranged(own_scale=True) == (-3, 40)
    assert ranged(distance=True) == (0, 40)
    assert ranged() == pytest.approx((0, 1), abs=0.005)


@pytest.mark.parametrize("columns", [("0", "1", "2"), ("encoder.conv", "encoder.norm", "fc")])
@pytest.mark.parametrize("rows", [1, 3, 60])
@pytest.mark.parametrize("kind", [{}, {"distance": True}, {"own_scale": True}, {"legend": "0: as at the start, " * 4}])
def test_nothing_of_a_heat_map_is_cut(columns: tuple[str, ...], rows: int, kind: dict[str, Any]) -> None:
    values = 1000 * torch.randn(rows, 3)
    names = tuple(f"model.encoder.layer{i}.attention" for i in range(rows))
    pixels = heat_map(
        SimilarityMap("m", "a title " * 30, names, columns, values, "layer", "epoch", 8, "n " * 99, **kind)
    )
    edges = (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:])
    assert all((edge == 255).all() for edge in edges)


def test_a_pointed_end_says_that_values_lie_outside() -> None:
    scale = ColourScale(0, 1)

    def colours_at_the_tips(*values: float) -> list[tuple[int, ...]]:
        bar = np.asarray(scale.bar(200, np.ma.asarray([values]), "label"))
        return [tuple(bar[y, 10].tolist()) for y in (GAP + 10, GAP + 200 - 10)]

    yellow, black, purple = (253, 231, 37), (0, 0, 0), (68, 1, 84)
    assert np.allclose(colours_at_the_tips(-0.5, 1.5), [yellow, black], atol=1)
    assert np.allclose(colours_at_the_tips(0, 1), [yellow, purple], atol=35)
    assert (np.asarray(scale.bar(200, np.ma.asarray([0.5]), ""))[GAP, :20] == INK).all()


@pytest.mark.parametrize(("value", "has_room"), [(10.0, True), (1e9, False)])
def test_numbers_that_cells_have_no_room_for_are_left_out(value: float, has_room: bool) -> None:
    cells = heat_map_module._cells(np.ma.asarray(np.full((1, 8), value)), ColourScale(0, 2 * value))
    inside = np.asarray(cells)[1:-1, 1:-1]
    assert (inside != inside[0, 0]).any() == has_room


def test_long_names_widen_the_map_and_lose_their_front() -> None:
    name = "model.backbone.stages.3.blocks.11.attention.output.projection"
    short, long = (
        heat_map(SimilarityMap("CKA", "t", (n, n), ("0",), torch.rand(2, 1), "layer", "epoch", 8)) for n in ("a", name)
    )
    assert long.shape[1] > short.shape[1] + 200
    assert heat_map_module._without_front(name).endswith("output.projection")
    assert len(heat_map_module._without_front(name)) == heat_map_module.LONGEST_LAYER_NAME
