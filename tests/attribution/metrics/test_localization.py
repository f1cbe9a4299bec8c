"""Boxes, peaks and energy against naive loops and scipy's components."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from lightning_interp.attribution import (
    BestLocalizationError,
    EnergyInside,
    LocalizationError,
    PointingGame,
    box_overlap,
    boxes_to_masks,
    energy_inside,
    localization_error,
    pointing,
)
from lightning_interp.attribution.metrics.localization import _largest_component


def naive_overlap(weights: Tensor, box: list[int], threshold: float) -> float:
    above = (weights > threshold * weights.max()).numpy()
    parts, _ = scipy.ndimage.label(above, structure=np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())[1:]
    rows, columns = np.nonzero(parts == 1 + sizes.argmax())
    drawn = {(y, x) for y in range(rows.min(), rows.max() + 1) for x in range(columns.min(), columns.max() + 1)}
    true = {(y, x) for y in range(box[1], box[3]) for x in range(box[0], box[2])}
    return len(drawn & true) / len(drawn | true)


@pytest.fixture
def blobs() -> tuple[Tensor, Tensor, Tensor]:
    """Smooth maps, boxes around where most of each is, and the boxes' masks."""
    noise = torch.randn(24, 1, 21, 26)
    maps = torch.nn.functional.avg_pool2d(noise, 7, 1, padding=3)[:, 0].double()
    peak = maps.flatten(1).argmax(1)
    y, x = peak // 26, peak % 26
    boxes = torch.stack([(x - 4).clamp(0), (y - 3).clamp(0), (x + 5).clamp(max=26), (y + 4).clamp(max=21)], dim=1)
    return maps, boxes, boxes_to_masks(boxes, (21, 26))


def test_boxes_become_masks() -> None:
    masks = boxes_to_masks(torch.tensor([[1, 0, 3, 2], [0, 1, 4, 3]]), (3, 4))
    expected = torch.zeros(2, 3, 4, dtype=torch.bool)
    expected[0, 0:2, 1:3] = expected[1, 1:3, 0:4] = True
    assert torch.equal(masks, expected)
    assert torch.equal(
        boxes_to_masks(torch.tensor([[0.6, 0.0, 2.4, 9.0]]), (1, 4))[0, 0], torch.tensor([0, 1, 0, 0]) > 0
    )


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.7])
def test_overlap_equals_a_naive_one(blobs: tuple[Tensor, Tensor, Tensor], threshold: float) -> None:
    maps, boxes, masks = blobs[0].relu(), *blobs[1:]
    expected = [naive_overlap(w, b, threshold) for w, b in zip(maps, boxes.tolist(), strict=True)]
    found = box_overlap(maps, masks, threshold)
    assert found.tolist() == pytest.approx(expected)
    assert localization_error(maps, masks, threshold).tolist() == [float(e <= 0.5) for e in expected]


def test_the_largest_component_is_scipys() -> None:
    above = torch.rand(40, 17, 23) > torch.linspace(0.3, 0.95, 40)[:, None, None]
    for found, given in zip(_largest_component(above), above, strict=True):
        parts, _ = scipy.ndimage.label(given.numpy(), structure=np.ones((3, 3)))
        sizes = np.bincount(parts.ravel())[1:]
        assert int(found.sum()) == sizes.max()
        assert len(np.unique(parts[found.numpy()])) == 1
        assert bool(given[found].all())


def test_a_long_component_is_followed_to_its_end() -> None:
    snake = torch.zeros(1, 31, 31, dtype=torch.bool)
    snake[0, ::2] = True
    for row in range(1, 31, 2):
        snake[0, row, 30 if row % 4 == 1 else 0] = True
    assert torch.equal(_largest_component(snake), snake)


def test_equal_components_and_corners() -> None:
    weights = torch.zeros(1, 6, 8)
    weights[0, 0, 5], weights[0, 1, 6], weights[0, 4, 1], weights[0, 5, 0] = 1, 1, 1, 1
    upper = boxes_to_masks(torch.tensor([[5, 0, 7, 2]]), (6, 8))
    assert box_overlap(weights, upper).tolist() == [1]


def test_half_an_overlap_is_an_error() -> None:
    weights = boxes_to_masks(torch.tensor([[0, 0, 4, 4], [0, 0, 4, 5]]), (8, 8)).float()
    masks = boxes_to_masks(torch.tensor([[0, 0, 4, 8], [0, 0, 4, 8]]), (8, 8))
    assert box_overlap(weights, masks).tolist() == [0.5, 0.625]
    assert localization_error(weights, masks).tolist() == [1, 0]


def test_pointing_hits_within_a_circle() -> None:
    masks = boxes_to_masks(torch.tensor([[4, 4, 6, 6]] * 4), (12, 12))
    maps = torch.zeros(4, 12, 12)
    for sample, (y, x) in enumerate([(5, 4), (5, 8), (7, 7), (8, 8)]):
        maps[sample, y, x] = 1
    # distances from the box: 0, 3, √8, √18
    for tolerance, hits in ((0, [1, 0, 0, 0]), (2, [1, 0, 0, 0]), (3, [1, 1, 1, 0]), (4, [1, 1, 1, 0]), (5, [1] * 4)):
        assert pointing(maps, masks, tolerance).tolist() == hits


def test_a_shared_maximum_hits_in_part() -> None:
    masks = boxes_to_masks(torch.tensor([[0, 0, 2, 4]]), (4, 4))
    maps = torch.zeros(1, 4, 4)
    maps[0, 1, 1] = maps[0, 2, 2] = maps[0, 3, 3] = maps[0, 0, 3] = 2
    assert pointing(maps, masks).tolist() == [0.25]


def test_energy_counts_what_is_positive() -> None:
    maps, masks = torch.randn(5, 6, 7).double(), torch.rand(5, 6, 7) > 0.5
    expected = []
    for weights, mask in zip(maps.tolist(), masks.tolist(), strict=True):
        cells = [
            (max(w, 0), m) for row, line in zip(weights, mask, strict=True) for w, m in zip(row, line, strict=True)
        ]
        expected.append(sum(w for w, m in cells if m) / sum(w for w, _ in cells))
    assert energy_inside(maps, masks).tolist() == pytest.approx(expected)


def test_maps_with_channels_are_what_is_shown_of_them(blobs: tuple[Tensor, Tensor, Tensor]) -> None:
    masks = blobs[2]
    maps = torch.randn(24, 3, 21, 26)
    for measure in (pointing, energy_inside, box_overlap):
        assert torch.equal(measure(maps, masks), measure(maps.abs().amax(1), masks))


def test_a_map_that_shows_nothing_finds_nothing() -> None:
    masks = boxes_to_masks(torch.tensor([[0, 0, 4, 4]] * 4), (4, 4))
    maps = torch.stack([torch.zeros(4, 4), -torch.ones(4, 4), torch.full((4, 4), torch.nan), torch.rand(4, 4)])
    maps[3, 1, 1] = torch.inf
    assert pointing(maps, masks)[:2].tolist() == [0, 0]
    assert energy_inside(maps, masks)[:2].tolist() == [0, 0]
    assert box_overlap(maps, masks)[:2].tolist() == [0, 0]
    assert localization_error(maps, masks)[:2].tolist() == [1, 1]
    for measure in (pointing, energy_inside, box_overlap, localization_error):
        assert measure(maps, masks)[2:].isnan().all()
    for metric in (PointingGame(), EnergyInside(), LocalizationError()):
        metric.update(maps, masks)
        assert bool(metric.compute().isnan())
    best = BestLocalizationError()
    best.update(maps, masks)
    assert {name: bool(value.isnan()) for name, value in best.compute().items()} == {"error": True, "threshold": True}


def test_metrics_are_means_over_batches(blobs: tuple[Tensor, Tensor, Tensor]) -> None:
    maps, _, masks = blobs
    pairs = [
        (PointingGame(3), pointing(maps, masks, 3)),
        (EnergyInside(), energy_inside(maps, masks)),
        (LocalizationError(0.6), localization_error(maps, masks, 0.6)),
    ]
    for metric, values in pairs:
        metric.update(maps[:5], masks[:5])
        metric.update(maps[5:], masks[5:])
        assert float(metric.compute()) == pytest.approx(float(values.mean()))


def test_the_best_threshold_is_the_best(blobs: tuple[Tensor, Tensor, Tensor]) -> None:
    maps, _, masks = blobs
    thresholds = (0.8, 0.3, 0.5, 0.6)
    errors = {t: float(localization_error(maps, masks, t).mean()) for t in thresholds}
    metric = BestLocalizationError(thresholds)
    metric.update(maps[:7], masks[:7])
    metric.update(maps[7:], masks[7:])
    found = metric.compute()
    assert len(set(errors.values())) > 1
    assert float(found["error"]) == pytest.approx(min(errors.values()))
    assert float(found["threshold"]) == pytest.approx(min(t for t in errors if errors[t] == min(errors.values())))


def test_of_equally_good_thresholds_the_smallest_is_named() -> None:
    maps = torch.zeros(1, 10, 10)
    maps[0, :8, :8], maps[0, 1:5, 1:5], maps[0, 2:4, 2:4] = 0.25, 0.45, 1.0
    metric = BestLocalizationError((0.6, 0.4, 0.3, 0.1))
    metric.update(maps, boxes_to_masks(torch.tensor([[1, 1, 5, 5]]), (10, 10)))
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(
        {"error": 0, "threshold": 0.3}
    )


def test_errors_name_what_does_not_fit(unchecked: None) -> None:
    maps, masks = torch.rand(2, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"maps: expected \(n, H, W\).*masks \(2, 4, 4\), got \(2, 4, 3\)"):
        pointing(maps[:, :, :3], masks)
    with pytest.raises(ValueError, match=r"masks: expected bool, .* with \[16, 0\] true positions"):
        EnergyInside().update(maps, masks & (torch.arange(2) == 0)[:, None, None])
    with pytest.raises(ValueError, match="masks: expected bool"):
        energy_inside(maps, masks.float())
    with pytest.raises(ValueError, match=r"boxes: expected rows x0, y0, x1, y1 .* got \[\[2, 0, 2, 4\]\]"):
        boxes_to_masks(torch.tensor([[2, 0, 2, 4]]), (4, 4))
    with pytest.raises(
        ValueError, match=r"LocalizationError\(threshold=...\): expected a share from 0, below 1, got 20"
    ):
        LocalizationError(20)
    with pytest.raises(ValueError, match=r"BestLocalizationError\(thresholds=...\): expected at least one"):
        BestLocalizationError(())
    with pytest.raises(ValueError, match=r"PointingGame\(tolerance=...\): expected a whole number from 0, got -1"):
        PointingGame(-1)
