"""A small version of the experiment that looks for wrong labels, and its arithmetic."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks_demo import mislabelled as demo
from lightning_interp.influence.results import SelfInfluence


def test_a_tenth_of_the_labels_is_flipped_to_another_one() -> None:
    data, again, other = demo.flip(300, 0), demo.flip(300, 0), demo.flip(300, 1)
    assert int(data.wrong.sum()) == 30
    assert torch.equal(data.labels, again.labels)
    assert not torch.equal(data.images, other.images)
    moves = (data.labels - data.true)[data.wrong] % 10
    assert int(moves.min()) >= 1
    assert len(moves.unique()) > 5


def test_what_a_ranking_finds() -> None:
    wrong = torch.tensor([True, False, False, True, False, False, False, False, False, False])
    curve = demo.share_found(torch.tensor([3, 1, 0, 2, 4, 5, 6, 7, 8, 9]), wrong)
    assert curve.tolist() == [0.5, 0.5] + [1.0] * 8
    assert demo.value_at_share(curve, 0.2) == 0.5
    assert demo.value_at_share(curve, 0.3) == 1.0


def test_remarks_say_who_wins_and_whether_the_bars_are_met() -> None:
    true = torch.arange(10)
    labels = true.clone()
    labels[3] = 7
    data = demo.NoisyDigits(torch.zeros(10, 1, 28, 28), labels, true)
    scores = torch.zeros(10)
    scores[3] = 1
    checked = SelfInfluence(scores, torch.arange(10), labels, scores, true, scores)
    results = {demo.EKFAC_NAME: [0.4, 0.8, 0.96, 1.0], demo.LOSS: [0.5, 0.9, 0.95, 1.0]}
    said = "\n".join(demo.remarks(results, data, checked))
    assert "The most after a tenth: loss (90.0%)." in said
    assert "80% after a tenth and 96% after a fifth? Yes: 80.0% and 96.0%." in said
    assert "more than the loss after a tenth? No" in said
    assert "suggests the true label in 100.0%; of all flips it has learned 0.0% by heart." in said
    results[demo.EKFAC_NAME][2] = 0.95
    assert "after a fifth? No" in "\n".join(demo.remarks(results, data, checked))


def test_a_small_run_finds_more_flips_than_chance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "FOLDS", 3)
    monkeypatch.setattr(demo, "Net", partial(demo.Net, width=8))
    results = demo.main(["--epochs", "8", "--samples", "900", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    for name, row in results.items():
        assert f"\n{name} " in said
        assert row == sorted(row), "looking at more samples finds no fewer"
        assert name == demo.CHANCE or row[2] > results[demo.CHANCE][2] + 0.25
    with Image.open(tmp_path / "mislabelled.png") as picture:
        assert picture.size[0] > 1000
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["mislabelled"]
