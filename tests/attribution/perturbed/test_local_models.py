"""LIME and KernelSHAP against naive transcriptions, brute force and models whose answer is known."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_interp import Task
from lightning_interp.attribution import LIME, Grid, KernelSHAP, Superpixels, any_size, by_width, probability
from lightning_interp.attribution.lime import locality
from lightning_interp.attribution.perturbed.coalitions import (
    bernoulli,
    distance_to_all,
    of_sizes,
    shapley,
    shapley_kernel,
)
from lightning_interp.attribution.perturbed.linear_models import k_lasso, weighted_ridge, with_fixed_sum
from lightning_interp.attribution.perturbed.local_models import LocalModels
from lightning_interp.attribution.perturbed.regions import default_regions, each_position
from tests.models import Net

METHODS = [LIME(samples=60, parts=Grid(3)), KernelSHAP(samples=60, parts=Grid(3))]
TARGET = torch.tensor([0, 1, 2, 1])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_ridge(masks: Tensor, y: Tensor, weights: Tensor, penalty: float) -> tuple[list[float], float, float]:
    """Normal equations with a column of ones that is not penalised, and R² by sums in Python."""
    rows = torch.cat([masks.double(), torch.ones(len(masks), 1, dtype=torch.float64)], 1)
    shrink = torch.eye(rows.shape[1], dtype=torch.float64) * penalty
    shrink[-1, -1] = 0
    found = torch.linalg.inv(rows.T @ weights.diag() @ rows + shrink) @ rows.T @ weights.diag() @ y.double()
    fitted = rows @ found
    mean = sum(w * v for w, v in zip(weights, y, strict=True)) / sum(weights)
    left = sum(w * (v - f) ** 2 for w, v, f in zip(weights, y, fitted, strict=True))
    all_of_it = sum(w * (v - mean) ** 2 for w, v in zip(weights, y, strict=True))
    return found[:-1].tolist(), float(found[-1]), float(1 - left / all_of_it)


def test_the_kernel_is_of_the_cosine_distance_and_the_empty_coalition_is_at_one() -> None:
    masks = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]]).bool()
    cosine = nn.functional.cosine_similarity(masks.double(), torch.ones(4, 4, dtype=torch.float64))
    expected = 1 - cosine
    assert torch.allclose(distance_to_all(masks), expected, atol=1e-12)
    assert distance_to_all(masks)[[0, 3]].tolist() == [0, 1]
    assert torch.allclose(locality(masks, 0.25), torch.exp(-(expected**2) / 0.125), atol=1e-12)


@pytest.mark.parametrize("draw", [bernoulli, any_size, shapley])
def test_coalitions_come_in_pairs_of_opposites(draw: Callable[..., Tensor]) -> None:
    masks = draw(12, 500, generator())
    assert masks.shape == (500, 12)
    assert torch.equal(masks[::2], ~masks[1::2])
    assert draw(12, 499, generator()).shape == (499, 12)
    assert torch.equal(masks, draw(12, 500, generator()))
    assert not torch.equal(masks, draw(12, 500, generator(1)))


def test_sizes_of_coalitions() -> None:
    sizes = torch.bincount(any_size(4, 20000, generator()).sum(1), minlength=5) / 20000
    assert torch.allclose(sizes, torch.full((5,), 0.2), atol=0.02)
    sizes = torch.bincount(bernoulli(4, 20000, generator()).sum(1), minlength=5) / 20000
    assert torch.allclose(sizes, torch.tensor([1.0, 4, 6, 4, 1]) / 16, atol=0.02)
    expected = torch.tensor([0] + [1 / (s * (12 - s)) for s in range(1, 12)] + [0])
    sizes = torch.bincount(shapley(12, 4000, generator()).sum(1), minlength=13) / 4000
    assert torch.allclose(sizes, expected / expected.sum(), atol=0.03)
    alike = of_sizes(torch.full((20000,), 2), 5, generator()).double()
    assert torch.allclose(alike.mean(0), torch.full((5,), 0.4, dtype=torch.float64), atol=0.02)


def test_few_parts_have_all_their_coalitions_with_the_shapley_kernel() -> None:
    masks = shapley(4, 14, generator())
    assert sorted(map(tuple, masks.tolist())) == sorted(itertools.product((False, True), repeat=4))[1:-1]
    by_size = dict(zip(masks.sum(1).tolist(), shapley_kernel(masks).tolist(), strict=True))
    assert by_size == pytest.approx({s: 3 / (math.comb(4, s) * s * (4 - s)) for s in (1, 2, 3)})
    assert len(shapley(4, 13, generator())) == 13


def test_weighted_ridge_is_the_naive_one() -> None:
    masks, scores, weights = bernoulli(5, 40, generator()), torch.randn(40, 3), torch.rand(40).double()
    found = weighted_ridge(masks, scores, weights, 1.0)
    for output in range(3):
        coefficients, _, r2 = naive_ridge(masks, scores[:, output], weights, 1.0)
        assert found.coefficients[:, output].tolist() == pytest.approx(coefficients, abs=1e-12)
        assert float(found.r2[output]) == pytest.approx(r2, abs=1e-12)


def test_parts_that_cannot_be_told_apart_are_said_to_be_so_whatever_rounding_makes_of_it() -> None:
    for seed in range(20):
        masks = bernoulli(4, 40, generator(seed))
        masks[:, 3] = masks[:, 1]
        weights = torch.rand(40).double()
        with pytest.raises(ValueError, match="tell 4 parts apart"):
            weighted_ridge(masks, torch.randn(40, 1), weights, 0.0)
        alike = weighted_ridge(masks, torch.randn(40, 1), weights, 1.0).coefficients[:, 0]
        assert float(alike[1]) == pytest.approx(float(alike[3]))


def test_lime_of_a_table_is_the_naive_one() -> None:
    net, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), torch.randn(4, 6).double()
    lime, mean = LIME(samples=100, baseline=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), torch.arange(6).double()
    seen: list[Tensor] = []
    method = replace(lime, draw=lambda *of: seen.append(bernoulli(*of)) or seen[-1])
    found = method(net, x, TARGET)
    for place in range(4):
        masks = seen[place]
        logits = torch.stack([net(torch.where(mask, x[place], mean))[TARGET[place]] for mask in masks]).detach()
        share = masks.double().sum(1) / (masks.double().sum(1).sqrt() * math.sqrt(6)).clamp(min=1e-9)
        coefficients, _, r2 = naive_ridge(masks, logits, torch.exp(-((1 - share) ** 2) / (2 * 0.25**2)), 1.0)
        assert found.maps[place].tolist() == pytest.approx(coefficients, abs=1e-10)
        assert float(found.facts["r2"][place]) == pytest.approx(r2, abs=1e-6)
    assert found.maps.dtype is torch.float64
    assert found.facts["parts"].tolist() == [6] * 4
    assert torch.equal(lime(net, x, TARGET).maps, found.maps)


def test_a_linear_model_is_found_exactly() -> None:
    net, x = nn.Linear(6, 3).double(), torch.randn(4, 6).double()
    expected = (net.weight[TARGET] * (x - 0.5)).detach()
    found = LIME(samples=200, baseline=0.5, ridge=0.0)(net, x, TARGET)
    assert torch.allclose(found.maps, expected, atol=1e-10)
    assert torch.allclose(found.facts["r2"], torch.ones(4))
    assert torch.allclose(KernelSHAP(baseline=0.5)(net, x, TARGET).maps, expected, atol=1e-10)
    shrunk = LIME(samples=200, baseline=0.5)(net, x, TARGET)
    assert not torch.allclose(shrunk.maps, expected, atol=1e-3)


def test_a_part_of_an_image_has_all_its_pixels_and_channels() -> None:
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(2 * 6 * 6, 3)).double(), torch.randn(2, 2, 6, 6).double()
    colour = torch.tensor([0.3, -0.2]).double()
    found = LIME(samples=200, parts=Grid(3), baseline=[0.3, -0.2], ridge=0.0)(net, x, TARGET[:2])
    terms = (net[1].weight[TARGET[:2]].view(2, 2, 6, 6) * (x - colour[:, None, None])).sum(1).detach()
    sums = nn.functional.avg_pool2d(terms, 2) * 4
    assert torch.allclose(found.maps, sums.repeat_interleave(2, 1).repeat_interleave(2, 2), atol=1e-10)


class Bag(nn.Module):
    """Adds a number per token id and class."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Embedding(10, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (self.values(ids) * attention_mask[..., None]).sum(1)


@pytest.mark.parametrize("method", [LIME(samples=300, baseline=9.0, ridge=0.0), KernelSHAP(baseline=9.0)])
def test_tokens_are_parts_and_those_that_do_not_count_stay(method: Any) -> None:
    net, ids = Bag(), torch.randint(1, 9, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = method(net, {"input_ids": ids, "ids": ids, "attention_mask": mask}, TARGET[:2], task=BAG)
    expected = torch.stack([net.values.weight[ids[i], TARGET[i]] - net.values.weight[9, TARGET[i]] for i in (0, 1)])
    assert torch.allclose(found.maps, (expected * mask).detach(), atol=1e-4)
    assert found.facts["parts"].tolist() == [5, 3]
    alone = method(net, {"ids": ids[1:], "attention_mask": mask[1:]}, TARGET[1:2], task=BAG)
    assert torch.allclose(found.maps[1:], alone.maps, atol=1e-5)


def test_a_sample_with_fewer_parts_is_asked_about_less() -> None:
    net = Bag()
    rows: list[int] = []
    net.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    task = Task(explained=BAG.explained, outputs=lambda module, inputs: module(inputs["ids"], inputs["mask"]))
    inputs = {"ids": torch.randint(1, 9, (2, 5)), "mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    task = replace(task, mask=lambda inputs: inputs["mask"])
    KernelSHAP(batch_size=3)(net, inputs, TARGET[:2], task=task)
    assert sum(rows) == 2**5 + 2**3
    assert max(rows) == 3


BAG = Task(explained=lambda inputs: inputs["ids"])


def test_a_sample_without_parts_has_an_empty_map() -> None:
    inputs = {"ids": torch.randint(1, 9, (2, 4)), "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}
    for method in (LIME(samples=20), LIME(samples=20, features=2), KernelSHAP()):
        found = method(Bag(), inputs, TARGET[:2], task=BAG)
        assert found.maps[1].tolist() == [0] * 4
        assert found.maps[0].abs().min() > 0 or method == LIME(samples=20, features=2)
        assert bool(found.facts["r2"].isnan()[1])


def brute_shapley(value: Callable[[set[int]], float], parts: int) -> list[float]:
    """Mean gain over all orders."""
    total = [0.0] * parts
    for order in itertools.permutations(range(parts)):
        for place, part in enumerate(order):
            total[part] += value(set(order[: place + 1])) - value(set(order[:place]))
    return [t / math.factorial(parts) for t in total]


@pytest.mark.parametrize("samples", [1024, 62])
def test_kernel_shap_of_few_columns_is_exact(samples: int) -> None:
    net, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), 3 * torch.randn(2, 6).double()
    background = torch.randn(6).double()
    found = KernelSHAP(samples, baseline=background)(net, x, TARGET[:2])
    for place in range(2):
        cache: dict[frozenset[int], float] = {}

        def value(on: set[int], place: int = place, cache: dict[frozenset[int], float] = cache) -> float:
            if frozenset(on) not in cache:
                row = torch.stack([x[place, c] if c in on else background[c] for c in range(6)])
                cache[frozenset(on)] = float(net(row)[TARGET[place]].detach())
            return cache[frozenset(on)]

        assert found.maps[place].tolist() == pytest.approx(brute_shapley(value, 6), abs=1e-10)


def test_drawn_coalitions_come_near_and_keep_the_sum() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double(), 2 * torch.randn(4, 8).double()
    exact, drawn = KernelSHAP()(net, x, TARGET), KernelSHAP(samples=200)(net, x, TARGET)
    rise = (net(x) - net(torch.zeros_like(x))).gather(1, TARGET[:, None])[:, 0]
    assert torch.allclose(drawn.maps.sum(1), rise.detach(), atol=1e-10)
    assert not torch.allclose(drawn.maps, exact.maps, atol=1e-6)
    assert float((drawn.maps - exact.maps).norm() / exact.maps.norm()) < 0.1


def test_one_part_has_the_whole_difference() -> None:
    net, x = Net().eval(), torch.randn(4, 1, 8, 8)
    found = KernelSHAP(parts=Grid(1))(net, x, TARGET)
    rise = (net(x) - net(torch.zeros_like(x))).gather(1, TARGET[:, None])
    assert torch.allclose(found.maps.flatten(1), rise.expand(-1, 64).detach(), atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_map_does_not_depend_on_neighbours_batches_or_runs(method: Any) -> None:
    net, x = Net().train(), torch.randn(4, 1, 8, 8)
    found = method(net, x, TARGET)
    assert torch.equal(found.maps, method(net, x, TARGET).maps)
    torch.manual_seed(7)
    alone = torch.cat([method(net, x[i : i + 1], TARGET[i : i + 1]).maps for i in range(4)])
    assert torch.allclose(found.maps, alone, atol=1e-4)
    others = method(net, torch.cat([100 * torch.randn(2, 1, 8, 8), x[:2]]), TARGET[[2, 1, 0, 1]])
    assert torch.allclose(found.maps[:2], others.maps[2:], atol=1e-4)
    small = replace(method, batch_size=7)(net, x, TARGET)
    assert torch.allclose(found.maps, small.maps, atol=1e-4)
    assert not torch.allclose(found.maps, method(net, x + 0.1, TARGET).maps, atol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_each_pixel_has_its_parts_coefficient_and_every_class_is_the_same_as_its_own(method: Any) -> None:
    net, x = Net(), torch.randn(4, 1, 8, 8)
    found = method(net, x, TARGET)
    assert found.maps.shape == (4, 8, 8)
    for part in Grid(3)(x[0]).unique():
        inside = found.maps[:, Grid(3)(x[0]) == part]
        assert torch.equal(inside, inside[:, :1].expand_as(inside))
    classes = method.all_classes(net, x)
    assert isinstance(classes, LocalModels)
    assert torch.allclose(classes.of(TARGET).maps, found.maps, atol=1e-6)
    assert classes.of(TARGET).method == found.method == f"{type(method).__name__}_grid_3"
    other = method(net, x, 2 - TARGET)
    assert torch.allclose(classes.of(2 - TARGET).maps, other.maps, atol=1e-6)
    assert torch.allclose(classes.of(2 - TARGET).facts["r2"], other.facts["r2"], atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_function_of_the_outputs_sees_the_whole_batch(method: Any) -> None:
    net, x, expected = Net(), torch.randn(4, 1, 8, 8), torch.zeros(0)
    expected = method(net, x, TARGET).maps
    found = method(net, x, lambda outputs: outputs.gather(1, TARGET[:, None])[:, 0])
    assert torch.allclose(found.maps, expected, atol=1e-4)
    assert found.target.tolist() == [-1] * 4


def test_other_scores_and_one_logit() -> None:
    net, x = nn.Linear(4, 3), torch.randn(4, 4)
    method = LIME(samples=50, score=probability)
    assert method.name == "LIME_of_probability"
    assert torch.allclose(method(net, x, TARGET).maps, method.all_classes(net, x).of(TARGET).maps, atol=1e-6)
    assert torch.allclose(
        method(net, x, TARGET).maps,
        LIME(samples=50)(net, x, lambda o: o.softmax(1).gather(1, TARGET[:, None])[:, 0]).maps,
        atol=1e-5,
    )
    binary, sides = nn.Linear(4, 1), torch.tensor([0, 1, 0, 1])
    found = LIME(samples=50).all_classes(binary, x)
    assert torch.allclose(found.of(sides).maps, LIME(samples=50)(binary, x, sides).maps, atol=1e-6)
    assert torch.allclose(found.of(sides).maps, -found.of(1 - sides).maps, atol=1e-6)


def test_widths_share_one_set_of_forwards() -> None:
    net, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), 3 * torch.randn(4, 6)
    forwards = []
    net.register_forward_hook(lambda *_: forwards.append(1))
    lime = LIME(samples=64)
    found = by_width(lime, net, x, TARGET, [0.05, 0.25, 2.0])
    assert len(forwards) == 4, "64 draws of 4 samples, 64 at a time"
    assert [e.method for e in found] == ["LIME_width_0.05", "LIME", "LIME_width_2"]
    assert torch.equal(found[1].maps, lime(net, x, TARGET).maps)
    assert torch.equal(found[2].facts["r2"], replace(lime, width=2.0)(net, x, TARGET).facts["r2"])
    assert not torch.allclose(found[0].maps, found[2].maps, atol=1e-2)


def test_the_lassos_path_finds_the_parts_that_count() -> None:
    true = torch.zeros(40, dtype=torch.float64)
    true[[3, 8, 30]] = torch.tensor([2.0, -1.0, 0.5]).double()
    masks = bernoulli(40, 300, generator())
    noisy = masks.double() @ true + 0.1 * torch.randn(300)
    weights = torch.rand(300).double() + 0.1
    found = k_lasso(masks, noisy[:, None], weights, 3)
    assert found.coefficients[:, 0].nonzero()[:, 0].tolist() == [3, 8, 30]
    expected, _, r2 = naive_ridge(masks[:, [3, 8, 30]], noisy, weights, 0.0)
    assert found.coefficients[[3, 8, 30], 0].tolist() == pytest.approx(expected, abs=1e-10)
    assert float(found.r2[0]) == pytest.approx(r2)
    assert k_lasso(masks, noisy[:, None], weights, 1).coefficients[:, 0].nonzero().tolist() == [[3]]
    exact = k_lasso(masks, (masks.double() @ true)[:, None], weights, 10)
    assert torch.allclose(exact.coefficients[:, 0], true, atol=1e-10)


def test_weights_enter_the_lassos_choice() -> None:
    """Two parts, each all that counts in one half of the draws."""
    masks = bernoulli(6, 400, generator())
    scores = torch.where(torch.arange(400) < 200, masks[:, 1].double(), 0.9 * masks[:, 4].double())[:, None]
    heavy = torch.where(torch.arange(400) < 200, 1.0, 0.01).double()
    assert k_lasso(masks, scores, heavy, 1).coefficients[:, 0].nonzero().tolist() == [[1]]
    assert k_lasso(masks, scores, heavy.flip(0), 1).coefficients[:, 0].nonzero().tolist() == [[4]]


def test_sparse_lime_has_as_many_parts_as_asked_for() -> None:
    net, x = nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(4, 30)
    method = LIME(samples=300, features=4)
    found = method(net, x, TARGET)
    assert method.name == "LIME_4_features"
    assert ((found.maps != 0).sum(1) <= 4).all()
    assert ((found.maps != 0).sum(1) > 0).all()
    dense = LIME(samples=300)(net, x, TARGET)
    assert (found.facts["r2"] < dense.facts["r2"]).all()
    assert torch.allclose(method.all_classes(net, x).of(TARGET).maps, found.maps, atol=1e-5)


def test_what_a_constant_or_nan_model_gives() -> None:
    x, lime = torch.randn(2, 4), LIME(samples=20)
    constant = Task(outputs=lambda module, x: torch.full((len(x), 2), 0.1))
    for method in (lime, replace(lime, features=2), KernelSHAP()):
        found = method(nn.Linear(4, 2), x, TARGET[:2], task=constant)
        assert torch.allclose(found.maps, torch.zeros(2, 4), atol=1e-12)
        assert bool(found.facts["r2"].isnan().all())
    broken = Task(outputs=lambda module, x: module(x) * torch.nan)
    for method in (lime, replace(lime, features=2), KernelSHAP()):
        found = method(nn.Linear(4, 2), x, TARGET[:2], task=broken)
        assert bool(found.maps.isnan().all())
        assert bool(found.facts["r2"].isnan().all())
    assert bool(LIME(samples=20, width=1e-6)(nn.Linear(4, 2), x, TARGET[:2]).maps.isnan().any())


def test_grids() -> None:
    labels = Grid(3)(torch.zeros(2, 7, 4))
    assert labels.shape == (7, 4)
    assert labels.unique().tolist() == list(range(9))
    assert labels[0].tolist() == [0, 0, 1, 2]
    assert Grid(8)(torch.zeros(1, 2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert Grid(2)(torch.zeros(1, 4, 4, 4)).unique().numel() == 8


def test_own_parts_may_have_gaps_and_what_stays() -> None:
    net, x = nn.Linear(5, 3).double(), torch.randn(2, 5).double()
    found = LIME(samples=100, ridge=0.0, parts=lambda row: torch.tensor([7, -1, 3, 7, -5]))(net, x, TARGET[:2])
    terms = (net.weight[TARGET[:2]] * x).detach()
    assert torch.allclose(found.maps[:, 0], terms[:, 0] + terms[:, 3])
    assert torch.equal(found.maps[:, 0], found.maps[:, 3])
    assert torch.allclose(found.maps[:, 2], terms[:, 2])
    assert found.maps[:, [1, 4]].tolist() == [[0, 0], [0, 0]]
    assert found.facts["parts"].tolist() == [2, 2]


def test_parts_that_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert default_regions(torch.zeros(1, 3, 8, 8)) == Grid()
    found = LIME(samples=20)(Net(), torch.randn(1, 1, 8, 8), TARGET[:1])
    assert found.method == "LIME_grid_8"
    assert found.facts["parts"].tolist() == [64]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert default_regions(torch.zeros(1, 3, 8, 8)) == Superpixels()
    assert default_regions(torch.zeros(1, 3, 8, 8, 8)) == Grid()
    assert default_regions(torch.zeros(1, 3, 8)) is default_regions(torch.zeros(1, 3)) is each_position
    assert LIME(samples=20)(nn.Linear(3, 3), torch.randn(1, 3), TARGET[:1]).method == "LIME"


def test_superpixels_ask_for_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(ImportError, match="scikit-image to be installed"):
        Superpixels()(torch.zeros(3, 8, 8))


@pytest.mark.parametrize("channels", [1, 3, 12])
def test_superpixels_follow_the_edges(channels: int) -> None:
    pytest.importorskip("skimage")
    image = torch.zeros(channels, 32, 32)
    image[:, :, 13:] = torch.rand(channels, 1, 1, generator=generator()) + 0.5
    labels = Superpixels(8)(image)
    assert 4 <= labels.unique().numel() <= 16
    crossing = set(labels[:, :13].unique().tolist()) & set(labels[:, 13:].unique().tolist())
    assert not crossing
    assert torch.equal(labels, Superpixels(8)(5 - 100 * image)) or channels > 1
    assert torch.equal(labels, Superpixels(8)(3 * image - 7))
    assert Superpixels(8)(torch.zeros(channels, 16, 16)).shape == (16, 16)
    assert Superpixels(8)(torch.full((channels, 16, 16), torch.nan)).shape == (16, 16)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_model_is_left_as_it_was(method: Any) -> None:
    net, x = Net().train(), torch.randn(2, 1, 8, 8, requires_grad=True)
    net.norm.eval()
    before, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    with torch.inference_mode():
        expected = method(net, x.detach().clone(), TARGET[:2].clone()).maps
    assert torch.equal(method(net, x, TARGET[:2]).maps, expected)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training
    assert not net.norm.training
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(random, torch.get_rng_state())
    with torch.autocast("cpu", torch.bfloat16):
        assert method(net, x, TARGET[:2]).maps.dtype is torch.float32


TABLE = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda: LIME(samples=1), r"LIME\(samples=...\): expected a whole number from 2, got 1"),
        (lambda: LIME(batch_size=0), r"LIME\(batch_size=...\)"),
        (lambda: LIME(features=0), r"LIME\(features=...\)"),
        (lambda: LIME(width=0.0), r"LIME\(width=...\): expected a positive distance, got 0.0"),
        (lambda: LIME(width=float("nan")), r"LIME\(width=...\)"),
        (lambda: LIME(ridge=-1.0), r"LIME\(ridge=...\): expected a penalty of at least 0"),
        (lambda: KernelSHAP(samples=1), r"KernelSHAP\(samples=...\)"),
        (lambda: KernelSHAP(batch_size=0), r"KernelSHAP\(batch_size=...\)"),
        (lambda: Grid(0), r"Grid\(side=...\)"),
        (lambda: Superpixels(0), r"Superpixels\(count=...\)"),
        (lambda: Superpixels(compactness=0.0), r"Superpixels\(compactness=...\)"),
        (lambda: LIME()(nn.Linear(4, 3), TABLE, torch.tensor([0, 3])), "classes 0 to 2"),
        (lambda: LIME(baseline=[1, 2])(nn.Linear(4, 3), TABLE, TARGET[:2]), "baseline: expected"),
        (lambda: LIME(parts=lambda x: x)(nn.Linear(4, 3), TABLE, TARGET[:2]), "parts: expected .* whole number"),
        (lambda: LIME(parts=lambda x: x[:2].long())(nn.Linear(4, 3), TABLE, TARGET[:2]), r"per position, \(4,\)"),
        (lambda: LIME(draw=lambda *_: TABLE)(nn.Linear(4, 3), TABLE, TARGET[:2]), "draw: expected booleans"),
        (lambda: LIME(samples=3, ridge=0.0)(nn.Linear(4, 3), TABLE, TARGET[:2]), "samples: expected enough"),
        (lambda: KernelSHAP(samples=4)(nn.Linear(9, 3), torch.ones(2, 9), TARGET[:2]), "samples: expected enough"),
        (lambda: LIME().all_classes(nn.Linear(4, 3), TABLE).of(torch.tensor([0, 3])), "among 0 to 2"),
        (lambda: LIME().all_classes(nn.Linear(4, 3), TABLE).of(torch.tensor([0])), "expected 2 classes"),
    ],
)
def test_errors_are_named(run: Callable[[], Any], says: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=says):
        run()


def naive_fixed_sum(masks: Tensor, scores: Tensor, weights: Tensor, none: Tensor, total: Tensor) -> Tensor:
    """Lagrange's equations, solved as they stand."""
    z, parts = masks.double(), masks.shape[1]
    system = torch.ones(parts + 1, parts + 1, dtype=torch.float64)
    system[:parts, :parts], system[parts, parts] = z.T @ weights.diag() @ z, 0
    right = torch.cat([z.T @ weights.diag() @ (scores - none), total[None]])
    return torch.linalg.solve(system, right)[:parts]


def test_a_fixed_sum_is_kept_by_the_naive_solution() -> None:
    masks, scores, weights = bernoulli(4, 20, generator()), torch.randn(20, 1).double(), torch.rand(20).double()
    none, total = torch.tensor([0.3]).double(), torch.tensor([1.7]).double()
    found = with_fixed_sum(masks, scores, weights, none, total)
    assert torch.allclose(found.coefficients, naive_fixed_sum(masks, scores, weights, none, total), atol=1e-10)
    fitted = none + masks.double() @ found.coefficients
    spread = scores - (weights @ scores) / weights.sum()
    assert float(found.r2) == pytest.approx(float(1 - weights @ (scores - fitted) ** 2 / (weights @ spread**2)))


def test_what_was_drawn_by_the_kernel_is_not_weighted_by_it_again() -> None:
    masks, scores = KernelSHAP(samples=100).coalitions(8, generator()), torch.randn(102, 1).double()
    found = KernelSHAP(samples=100).fit(masks, scores).coefficients
    alike = torch.ones(100, dtype=torch.float64)
    expected = naive_fixed_sum(masks[2:], scores[2:], alike, scores[1], scores[0] - scores[1])
    assert torch.allclose(found, expected, atol=1e-10)


def test_the_lime_package_agrees() -> None:
    """Its ridge is ours; its sparse models have the same parts, with a ridge where the paper has least squares."""
    package = pytest.importorskip("lime.lime_base")
    masks = bernoulli(20, 500, generator())
    scores = masks.double() @ torch.randn(20, 1).double() + torch.randn(500, 1).double()
    base = package.LimeBase(lambda distance: np.exp(-(distance**2) / (2 * 0.25**2)))
    drawn = (masks.double().numpy(), scores.numpy(), distance_to_all(masks).numpy(), 0)
    weights = locality(masks, 0.25)
    ridge = weighted_ridge(masks, scores, weights)
    _, pairs, r2, _ = base.explain_instance_with_data(*drawn, 20, feature_selection="none")
    assert [value for _, value in sorted(pairs)] == pytest.approx(ridge.coefficients[:, 0].tolist(), abs=1e-10)
    assert r2 == pytest.approx(float(ridge.r2[0]))
    for most in (3, 5, 8):
        _, pairs, _, _ = base.explain_instance_with_data(*drawn, most, feature_selection="lasso_path")
        ours = k_lasso(masks, scores, weights, most).coefficients[:, 0].nonzero()[:, 0].tolist()
        assert sorted(part for part, _ in pairs) == ours
