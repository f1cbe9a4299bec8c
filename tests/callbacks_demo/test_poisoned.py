"""A small version of the attack on training images, with a front that needs no package, and its arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from callbacks_demo import poisoned as demo


class Blocks(nn.Module):
    """Means over blocks of pixels, in place of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 4).flatten(1) * self.scale


def test_the_regression_is_that_of_scikit_learn() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 60), (torch.arange(40) % 2).float()[:, None]
    found = demo.logistic_regression(TensorDataset(x, y))
    other = LogisticRegression(C=1 / (40 * demo.DECAY), fit_intercept=False, tol=1e-10, max_iter=10_000)
    other.fit(F.pad(x, (0, 1), value=1).double().numpy(), y[:, 0].numpy())
    weights = torch.cat([found.get_parameter("weight")[0], found.get_parameter("bias")]).detach()
    torch.testing.assert_close(weights, torch.tensor(other.coef_[0]).float(), rtol=1e-4, atol=1e-5)


def test_probability_is_that_of_the_querys_own_class() -> None:
    net = nn.Linear(1, 1)
    net.load_state_dict({"weight": torch.tensor([[2.0]]), "bias": torch.tensor([0.0])})
    of = [demo.probability(net, TensorDataset(torch.ones(1, 1), torch.tensor([[label]]))) for label in (1.0, 0.0)]
    assert of == pytest.approx([0.8808, 0.1192], abs=1e-4)


def attacked(after: float, levels: float) -> demo.Attack:
    image = torch.full((1, 1, 4, 4), 100 / 255)
    return demo.Attack(60, [0], 0.9, after, image, image + levels / 255)


def test_counts_and_remarks() -> None:
    found = {1: [attacked(0.4, 0.4), attacked(0.8, 0.4)], 2: [attacked(0.4, -0.4), attacked(0.6, 0.4)]}
    assert demo.summary_line(1, found[1]).startswith(
        "1 image changed: 1 of 2 predictions flipped; probability fell by 0.10"
    )
    said = "\n".join(demo.remarks(found, 0.49))
    assert "With 1: at least 20%? Yes: 50%" in said
    assert "With 2: at least 60%? No: 50%" in said
    assert "more than 0.40 grey levels of 255 (0.49 allowed); their 8-bit files are the same." in said
    found[2][0] = attacked(0.4, 1.0)
    assert "more than 1.00 grey levels of 255 (1 allowed); their 8-bit files differ." in demo.remarks(found, 1)[-1]


def test_a_small_attack_lowers_the_probability_within_its_levels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "Features", Blocks)
    small = ["--queries", "3", "--steps", "3", "--size", "28", "--levels", "7", "--folder", str(tmp_path)]
    found = demo.main(small)
    said = capsys.readouterr().out
    for count, attacks in found.items():
        assert [len(one.positions) for one in attacks] == [count] * 3
        for one in attacks:
            moved = (one.changed - one.originals).abs() * 255
            assert one.before > 0.5
            assert one.after < one.before
            assert 1 < float(moved.max()) < 7.001
            torch.testing.assert_close(one.changed * 255, (one.changed * 255).round())
    by_one, by_two = (sum(one.after for one in found[count]) for count in (1, 2))
    assert by_two < by_one
    assert "1 image changed: " in said
    assert "8-bit files differ" in said
    with Image.open(tmp_path / "poisoned.png") as picture:
        assert picture.size[0] > 700
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["images"] == ["poisoned"]
