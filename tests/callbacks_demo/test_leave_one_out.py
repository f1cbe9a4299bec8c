"""Pictures of influence's numbers, and a small version of the experiment that retrains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from callbacks_demo import leave_one_out as demo
from lightning_interp.influence import Factors, Retrained
from lightning_interp.views.canvas import Pixels
from lightning_interp.views.influence import (
    HARMFUL,
    HELPFUL,
    QuerySamplePair,
    RetrainingPanel,
    factors,
    impact,
    scatter,
)


def coloured(pixels: Pixels, colour: str) -> np.ndarray:
    """Return where an image has a colour, up to the blur of its edges."""
    wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
    return np.abs(pixels.astype(int) - wanted).max(2) < 12


def test_the_scatter_has_a_panel_and_two_colours_for_each_comparison() -> None:
    retrained = Retrained(torch.randn(20, 30), torch.randn(20, 30))
    one = scatter([RetrainingPanel("a", retrained, torch.arange(30) > 14)])
    two = scatter([RetrainingPanel("a", retrained, torch.zeros(30).bool())] * 2)
    assert two.shape[1] > 1.8 * one.shape[1]
    assert coloured(one, HARMFUL).any()
    assert not coloured(two, HARMFUL).any()


def test_bars_point_where_their_factor_does() -> None:
    found = Factors(torch.ones(1), torch.ones(2), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2), torch.ones(1, 2))
    pixels = factors(found, [QuerySamplePair(0, 0, "first"), QuerySamplePair(0, 1, "second")])
    blue, orange = (coloured(pixels, colour) for colour in (HELPFUL, HARMFUL))
    middle = pixels.shape[0] // 2
    assert blue[:middle].sum() > blue[middle:].sum() > 0, "one of the second row's six bars is negative"
    assert not orange[: middle - 5].any()
    assert orange[middle:].any()


def test_impact_lies_on_the_line_where_the_number_alone_makes_it() -> None:
    sizes = [10, 100, 1000]
    flat, steep = (impact(sizes, torch.tensor(sizes).double()[:, None] ** power) for power in (-0.5, -1.0))
    assert flat.shape == steep.shape
    assert coloured(steep, HARMFUL).sum() < 0.5 * coloured(flat, HARMFUL).sum(), "the mean covers the line of 1/n"


def test_half_of_the_removals_are_the_most_influential() -> None:
    scores = torch.randn(3, 50, dtype=torch.float64)
    found = demo.pick_removals(scores, 11)
    assert len(set(found.which)) == 11
    assert found.random.tolist() == [False] * 5 + [True] * 6
    assert set(found.which[:5]) == set(scores.abs().amax(0).topk(5).indices.tolist())


def test_the_root_is_of_the_gauss_newton_matrix() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    data = torch.randn(12, 1, 2, 2, dtype=torch.float64), torch.arange(12) % 3
    problem, at = demo.Problem(net, data, 12, 0.1), torch.randn(15, dtype=torch.float64)
    root = problem.root(at)
    expected = torch.autograd.functional.hessian(problem, at)
    assert torch.allclose(root @ root.mT, expected)


def test_coordinates_change_the_way_but_not_the_end() -> None:
    matrix = torch.diag(torch.tensor([1.0, 100.0, 1e4], dtype=torch.float64))
    goal, start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)

    def objective(at: Tensor) -> Tensor:
        return (at - goal) @ matrix @ (at - goal) / 2

    root = torch.linalg.cholesky(matrix)
    for coordinates in (None, root):
        assert torch.allclose(demo.minimise(objective, start, 100, coordinates), goal)
    assert torch.allclose(demo.minimise(objective, start, 3, root), goal)
    assert not torch.allclose(demo.minimise(objective, start, 3), goal)


def test_refitting_keeps_the_weight_of_each_sample() -> None:
    train, _ = demo.digits()
    few = train[0][:80], train[1][:80]
    start, kept = torch.zeros(10, 65, dtype=torch.float64), [i for i in range(80) if i != 3]
    found = demo.refit(few, kept, start)
    chances = (few[0][kept] @ found.T).softmax(1)
    gradient = (chances - F.one_hot(few[1][kept], 10)).T @ few[0][kept] / 80 + demo.LOGISTIC_DECAY * found
    assert float(gradient.norm()) < 1e-6


def tiny_cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 10)).double()


def test_a_small_run_agrees_and_leaves_its_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "TRAINED_ON", 120)
    monkeypatch.setattr(demo, "small_cnn", tiny_cnn)
    monkeypatch.setattr(demo, "SIZES", (50, 100))
    found = demo.main(["--removals", "6", "--network-removals", "4", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert list(found) == [demo.PLAIN, demo.CORRECTED, demo.NETWORK]
    assert found[demo.PLAIN].retrained.pearson >= 0.99
    assert found[demo.CORRECTED].retrained.relative_error < found[demo.PLAIN].retrained.relative_error
    assert found[demo.NETWORK].retrained.actual.shape == (20, 4)
    assert found[demo.NETWORK].retrained.pearson > 0.5
    assert "Logistic regression reaches r = 0.99: yes" in said
    for kind in ("6 all", "3 most influential", "4 all", "2 random"):
        assert f" {kind} " in said
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    names = ("scatter", "factors", "impact")
    assert sorted(events.Tags()["images"]) == sorted(f"leave_one_out/{name}" for name in names)
    for name in names:
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 400
