"""Curves against naive loops, ranks against scipy, metrics alone, together and under DDP."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_interp.attribution import (
    BestLocalizationError,
    DeadMaps,
    DeletionArea,
    EnergyInside,
    InsertionArea,
    LocalizationError,
    PointingGame,
    dead,
    deletion_curve,
    flat_map,
    insertion_curve,
    logit,
    rank_correlation,
)
from lightning_interp.attribution.metrics.rank_correlation import rank_positions
from tests.models import Net
from tests.ranks import run_on_two_ranks


class Reader(nn.Module):
    """Token ids with an attention mask, to which tokens left out still leak."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        kept = attention_mask[:, :, None].to(self.words.weight) + 0.1
        return self.head((self.words(input_ids).tanh() * kept).sum(1) / kept.sum(1))


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.fixture
def images() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    return Net().double(), torch.randn(4, 1, 8, 8).double(), torch.randn(4, 8, 8).double(), torch.tensor([0, 1, 2, 1])


def naive(
    net: nn.Module, x: Tensor, weights: Tensor, target: int, steps: int, start: Tensor, end: Tensor
) -> list[float]:
    """Turn the pixels of `start` (C, H, W) into those of `end`, one by one, and ask along the way."""
    pixels = sorted(((float(w), place) for place, w in enumerate(weights.flatten())), reverse=True)
    scores = []
    for k in range(steps + 1):
        mixed = start.clone()
        for _, place in pixels[: round(k * len(pixels) / steps)]:
            mixed[:, place // x.shape[2], place % x.shape[2]] = end[:, place // x.shape[2], place % x.shape[2]]
        with torch.no_grad():
            scores.append(float(net(mixed[None]).softmax(1)[0, target]))
    return scores


@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("inserting", [False, True])
def test_curves_equal_a_naive_loop(images: Any, steps: int, inserting: bool) -> None:
    net, x, maps, target = images
    curve = (insertion_curve if inserting else deletion_curve)(net, x, maps, target, steps=steps, baseline=0.3)
    blank = torch.full_like(x, 0.3)
    start, end = (blank, x) if inserting else (x, blank)
    net.eval()
    expected = [naive(net, x[i], maps[i], int(target[i]), steps, start[i], end[i]) for i in range(4)]
    assert curve.shape == (4, steps + 1)
    assert torch.allclose(curve, torch.tensor(expected).double(), atol=1e-12)


def test_all_channels_of_a_pixel_go_together() -> None:
    x, target = torch.rand(2, 3, 4, 4).double(), torch.tensor([0, 1])
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).double()
    maps = torch.randn(2, 3, 4, 4).double()
    found = deletion_curve(net, x, maps, target, baseline=(0.1, 0.2, 0.3))
    shown = maps.abs().amax(1)
    blank = torch.tensor([0.1, 0.2, 0.3]).double().reshape(3, 1, 1).expand(3, 4, 4)
    expected = [naive(net, x[i], shown[i], int(target[i]), 16, x[i], blank) for i in range(2)]
    assert torch.allclose(found, torch.tensor(expected).double(), atol=1e-12)


def test_a_sequence_goes_step_by_step() -> None:
    x, target, maps = torch.randn(2, 4, 3).double(), torch.tensor([0, 1]), torch.randn(2, 4).double()
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    found = deletion_curve(net, x, maps, target, steps=4)
    as_image = nn.Sequential(nn.Flatten(2), Turned(), net)
    image = x.transpose(1, 2)[:, :, :, None]
    blank = torch.zeros(3, 4, 1).double()
    expected = [naive(as_image, image[i], maps[i], int(target[i]), 4, image[i], blank) for i in range(2)]
    assert torch.allclose(found, torch.tensor(expected).double(), atol=1e-12)


def test_of_tokens_only_those_that_the_mask_keeps() -> None:
    net, ids = Reader().double(), torch.randint(1, 11, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    maps = torch.tensor([[0.1, 0.4, 0.2, 0.3, 9.0, torch.nan], [0.6, 0.5, 0.1, 0.2, 0.3, 0.4]]).double()
    inputs = {"input_ids": ids, "attention_mask": mask}
    target = torch.tensor([2, 0])
    orders = ([1, 3, 2, 0], [0, 1, 5, 4, 3, 2])
    deleted = deletion_curve(net, inputs, maps, target, steps=12)
    inserted = insertion_curve(net, inputs, maps, target, steps=12)
    for row, order in enumerate(orders):
        for k in range(13):
            gone = order[: round(k * len(order) / 12)]
            less = ids[row].clone()
            less[gone] = 0
            more = torch.zeros_like(less).where(mask[row] > 0, ids[row])
            more[gone] = ids[row, gone]
            with torch.no_grad():
                a, b = (net(t[None], mask[row : row + 1]).softmax(1)[0, target[row]] for t in (less, more))
            assert float(deleted[row, k]) == pytest.approx(float(a), abs=1e-12)
            assert float(inserted[row, k]) == pytest.approx(float(b), abs=1e-12)


def test_few_columns_have_the_exact_area() -> None:
    net = nn.Linear(3, 2, bias=False).double()
    x, target = torch.randn(5, 3).double(), torch.tensor([0, 1, 0, 1, 0])
    maps = (net.weight[target] * x).detach()
    metric = DeletionArea(steps=16, score=logit)
    metric.update(net, x, maps, target)
    areas = []
    for row in maps:
        left = [float(row.sum())]
        for value in sorted(row.tolist(), reverse=True):
            left.append(left[-1] - value)
        areas.append(sum((a + b) / 2 / 3 for a, b in itertools.pairwise(left)))
    assert float(metric.compute()) == pytest.approx(sum(areas) / 5, abs=1e-12)


def test_a_map_that_knows_beats_its_opposite(images: Any) -> None:
    net, x, _, target = images
    with torch.no_grad():
        net.eval()
        whole = net(x).gather(1, target[:, None])
        loss = [
            whole - net(x * (torch.arange(64).reshape(8, 8) != place)).gather(1, target[:, None]) for place in range(64)
        ]
    knows = torch.cat(loss, dim=1).reshape(4, 8, 8)
    areas = []
    for maps in (knows, -knows):
        for metric in (DeletionArea(), InsertionArea()):
            metric.update(net, x, maps, target)
            areas.append(float(metric.compute()))
    assert areas[0] < areas[2]
    assert areas[1] > areas[3]


def test_equal_positions_come_at_random_and_the_same_again(images: Any) -> None:
    net, x, _, target = images
    zeros, everything = torch.zeros(2, 400), torch.ones(2, 400, dtype=torch.bool)
    found = rank_positions(zeros, everything, [5, 6])
    assert [sorted(row) for row in found.tolist()] == [list(range(400))] * 2
    assert float(rank_correlation(found[:1].double(), torch.arange(400.0)[None].double())) < 0.2  # not from the top
    assert float(rank_correlation(found[:1].double(), found[1:].double())) < 0.2  # nor alike in all samples
    half = rank_positions(torch.arange(400.0).ge(200).float().expand(2, -1), everything, [5, 6])
    assert bool((half[:, 200:] < 200).all())
    together = deletion_curve(net, x, torch.zeros(4, 8, 8), target)
    alone = torch.cat([deletion_curve(net, x[i : i + 1], torch.zeros(1, 8, 8), target[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-12)


def test_neither_neighbours_nor_batches_matter_and_the_model_stays(images: Any) -> None:
    net, x, maps, target = images
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    together = insertion_curve(net, x, maps, target, batch_size=3)
    other = torch.cat([x[:1], 100 * x[1:]])
    assert torch.allclose(insertion_curve(net, other, maps, target)[0], together[0], atol=1e-12)
    assert torch.allclose(insertion_curve(net, x, maps, target, batch_size=64), together, atol=1e-12)
    assert all(part.training for part in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_callable_target_sees_the_whole_batch(images: Any) -> None:
    net, x, maps, target = images

    def of_batch(outputs: Tensor) -> Tensor:
        return outputs.softmax(1).gather(1, target[:, None])[:, 0]

    assert torch.allclose(deletion_curve(net, x, maps, of_batch), deletion_curve(net, x, maps, target), atol=1e-12)


def test_a_map_that_is_not_finite_gives_nan(images: Any) -> None:
    net, x, maps, target = images
    clean = deletion_curve(net, x, maps, target)
    for bad in (torch.nan, torch.inf):
        maps[1, 3, 3] = bad
        found = deletion_curve(net, x, maps, target)
        assert bool(found[1].isnan().all())
        assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])
        metric = DeletionArea()
        metric.update(net, x, maps, target)
        assert bool(metric.compute().isnan())


def test_in_inference_mode_and_after(images: Any) -> None:
    net, x, maps, target = images
    metric, whole = InsertionArea(), InsertionArea()
    with torch.inference_mode():
        metric.reset()
        metric.update(net, x.clone(), maps.clone(), target.clone())
    metric.update(net, x, maps, target)
    whole.update(net, x, maps, target)
    assert float(metric.compute()) == pytest.approx(float(whole.compute()), abs=1e-12)


def test_the_area_is_the_mean_over_batches(images: Any) -> None:
    net, x, maps, target = images
    for metric, curve in ((DeletionArea(), deletion_curve), (InsertionArea(), insertion_curve)):
        metric.update(net, x[:3], maps[:3], target[:3])
        metric.update(net, x[3:], maps[3:], target[3:])
        expected = torch.trapezoid(curve(net, x, maps, target), dx=1 / 16, dim=1).mean()
        assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-12)


def test_rank_correlation_equals_scipy() -> None:
    a, b = torch.randn(6, 5, 8), torch.randn(6, 5, 8)
    for x, y in ((a, b), (a.round(), b.round()), (a.relu(), -a), (a.relu(), b.relu().double()), (a, a)):
        x, y = x.double(), y.double()
        expected = [scipy.stats.spearmanr(p.flatten(), q.flatten()).statistic for p, q in zip(x, y, strict=True)]
        assert rank_correlation(x, y).tolist() == pytest.approx(expected, abs=1e-12)
        assert rank_correlation(x.float().transpose(1, 2), y.float().transpose(1, 2)).tolist() == pytest.approx(
            expected
        )


def test_rank_correlation_is_nan_where_a_map_says_nothing() -> None:
    a, b = torch.randn(4, 9), torch.randn(4, 9)
    a[0], b[1, 2], a[2, 0] = 3.0, torch.nan, torch.inf
    assert rank_correlation(a, b).isnan().tolist() == [True, True, True, False]
    assert rank_correlation(b, a).isnan().tolist() == [True, True, True, False]


def test_one_number_per_position() -> None:
    raw, maps = torch.zeros(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert torch.equal(flat_map(maps, raw), maps.abs().amax(1).flatten(1))
    assert torch.equal(flat_map(maps[:, 0], raw), maps[:, 0].flatten(1))
    table = torch.randn(2, 4)
    assert torch.equal(flat_map(table, torch.zeros(2, 4)), table)
    assert torch.equal(flat_map(table, torch.zeros(2, 4, 7)), table)
    assert torch.equal(flat_map(table, torch.zeros(2, 7, 4)), table)


def test_dead_maps() -> None:
    maps = torch.randn(5, 3, 2, 2)
    maps[0], maps[1, 0, 0, 0], maps[2, 0, 0, 0], maps[3], maps[4, 0, 0, 0] = 0.0, torch.nan, -torch.inf, 2.0, 0.0
    assert dead(maps).tolist() == [True, True, True, False, False]
    metric = DeadMaps()
    metric.update(maps[:1])
    metric.update(maps[1:])
    assert float(metric.compute()) == pytest.approx(0.6)


def test_metrics_of_one_collection_keep_apart() -> None:
    maps, masks = torch.zeros(2, 6, 6), torch.zeros(2, 6, 6, dtype=torch.bool)
    maps[:, 1, 1], masks[:, :2, :2] = 1.0, True
    both = MetricCollection([PointingGame(), EnergyInside()])
    both.add_metrics({"near": PointingGame(tolerance=2)})
    both.update(maps, masks)  # all three are 1 here
    both.update(maps.roll(2, dims=2) + 0.5, masks)
    found = {name: float(value) for name, value in both.compute().items()}
    inside = (4 * 0.5) / (36 * 0.5 + 1)
    assert found == pytest.approx({"PointingGame": 0.5, "near": 1.0, "EnergyInside": (1 + inside) / 2})


def test_errors_name_what_does_not_fit(images: Any, unchecked: None) -> None:
    net, x, maps, target = images
    with pytest.raises(
        ValueError, match=r"maps: expected one number per position of an input \(4, 1, 8, 8\), got \(4, 8, 7\)"
    ):
        deletion_curve(net, x, maps[:, :, :7], target)
    with pytest.raises(ValueError, match=r"deletion_curve\(steps=...\): expected a whole number from 1, got 0"):
        deletion_curve(net, x, maps, target, steps=0)
    with pytest.raises(ValueError, match=r"InsertionArea\(batch_size=...\)"):
        InsertionArea(batch_size=0)
    with pytest.raises(ValueError, match="baseline: expected a number"):
        insertion_curve(net, x, maps, target, baseline=(1.0, 2.0))
    with pytest.raises(ValueError, match="target: expected classes 0 to 2"):
        deletion_curve(net, x, maps, target + 1)
    with pytest.raises(ValueError, match=r"b: expected maps \(n, ...\) in a's shape \(4, 8, 8\), got \(4, 8, 7\)"):
        rank_correlation(maps, maps[:, :, :7])


def updated(rows: slice) -> dict[str, Any]:
    """Return what each metric says after the given samples."""
    torch.manual_seed(0)
    net, x, maps = Net(), torch.randn(5, 1, 8, 8), torch.randn(5, 8, 8)
    masks, target = torch.rand(5, 8, 8) > 0.5, torch.tensor([0, 1, 2, 1, 0])
    areas = [DeletionArea(), InsertionArea()]
    found = [PointingGame(), EnergyInside(), LocalizationError(), BestLocalizationError()]
    empty = DeadMaps()
    for metric in areas:
        metric.update(net, x[rows], maps[rows], target[rows])
    for metric in found:
        metric.update(maps[rows], masks[rows])
    empty.update(maps[rows] * (target[rows] > 0)[:, None, None])
    return {type(metric).__name__: metric.compute() for metric in (*areas, *found, empty)}


def rank(number: int, folder: str) -> None:
    """Be one of two processes, with a part of the samples."""
    torch.save(updated((slice(0, 3), slice(3, 5))[number]), f"{folder}/{number}.pt")


def test_two_ranks_say_what_one_says(tmp_path: Path) -> None:
    run_on_two_ranks(rank, tmp_path)
    whole = updated(slice(0, 5))
    for number in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{number}.pt"), whole)
