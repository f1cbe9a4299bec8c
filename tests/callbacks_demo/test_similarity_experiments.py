"""The demo's experiments: small versions of them, and their arithmetic on tables whose answer is known."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset

from callbacks_demo import bottom_up, correspondence
from callbacks_demo.correspondence import Score
from lightning_interp import compare
from lightning_interp.similarity import CKA, prepare

NAN = float("nan")
SHIFTED = torch.tensor([[0.1, 0.9, 0.0], [0.0, 0.1, 0.9], [0.9, 0.0, 0.1]])


def test_a_layer_is_found_where_its_own_column_is_the_largest() -> None:
    values = torch.tensor([[0.9, 0.7, 0.1], [0.95, 0.8, 0.1], [0.2, 0.3, 0.4]])
    assert correspondence.finds_its_counterpart(values).tolist() == [True, False, True]
    assert correspondence.finds_its_counterpart(values.T).tolist() == [False, True, True]


def test_what_is_not_defined_is_not_found() -> None:
    values = torch.tensor([[NAN, NAN, NAN], [NAN, 0.1, NAN], [0.9, NAN, 0.5]])
    assert correspondence.finds_its_counterpart(values).tolist() == [False, True, False]
    score = correspondence.tally({(0, 1): values, (0, 2): torch.eye(3), (1, 2): torch.eye(3)})
    assert score.undefined == pytest.approx(1 / 9)


def test_accuracy_and_its_spread_over_networks() -> None:
    """Networks 0 and 1 agree; 2 is like neither, so that the pairs' accuracies are 1, 0, 0."""
    score = correspondence.tally({(0, 1): torch.eye(3), (0, 2): SHIFTED, (1, 2): SHIFTED})
    of_each = torch.tensor([0.5, 0.5, 0.0])
    assert score.accuracy == pytest.approx(1 / 3)
    assert score.spread == pytest.approx(float(of_each.std()))
    assert score.undefined == 0


def test_networks_that_are_each_others_rotation_agree() -> None:
    layers = [torch.randn(40, width) for width in (3, 5, 8)]
    turned = [layer @ torch.linalg.qr(torch.randn(layer.shape[1], layer.shape[1]))[0] for layer in layers]
    networks = [[prepare(layer) for layer in network] for network in (layers, turned)]
    assert correspondence.score(CKA(), networks) == Score(1, 0, 0)


def test_pooling_takes_the_mean_over_positions() -> None:
    maps = torch.randn(20, 3, 4, 4)
    pooled = correspondence.pool(prepare(maps.flatten(1)), channels=3).features
    assert pooled is not None
    torch.testing.assert_close(pooled, maps.mean(dim=(2, 3)))


def test_the_table_marks_what_is_not_defined_and_shows_the_papers_numbers() -> None:
    scores = {row.name: [Score(0.125, 0.01, 0.5), Score(0.5, 0.02, 0)] for row in correspondence.ROWS}
    scores["CKA, linear"] = [Score(0.976, 0.015, 0), Score(0.9, 0, 0)]
    lines = {line[:24].strip(): line[24:].split() for line in correspondence.table(scores)}
    assert lines["CCA, mean ρ"] == ["12.5", "±", "1.0*", "50.0", "±", "2.0", "1.4"]
    assert lines["CKA, linear"] == ["97.6", "±", "1.5", "90.0", "±", "0.0", "99.3"]
    assert lines["Procrustes"][-1] == "–"
    said = "\n".join(correspondence.remarks(scores, [0.9, 1.0]))
    assert "Flattened: linear CKA finds 97.6%, the best kind of CCA (CCA, mean ρ) 12.5%." in said
    assert "PWCCA for 50%" in said
    assert "CKA, linear for" not in said
    assert "2 networks, mean validation accuracy 95.0%." in said


def test_correspondence_of_two_small_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--networks", "2", "--epochs", "1", "--widths", "4", "6", "8", "--folder", str(tmp_path)]
    scores = correspondence.main(small)
    said = capsys.readouterr().out
    for row in correspondence.ROWS:
        assert f"\n{row.name} " in said
        for score in scores[row.name]:
            assert 0 <= score.accuracy <= 1
            assert score.spread == pytest.approx(0), "both networks take part in the one pair"
    assert "2 networks, mean validation accuracy" in said
    runs = sorted((tmp_path / "lightning_logs").iterdir())
    again = compare(*runs, measures=[CKA()]).correspondence("CKA")
    assert scores["CKA, linear"][0].accuracy == pytest.approx(again)


def test_one_network_is_too_few(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        correspondence.main(["--networks", "1"])
    assert "--networks: expected at least 2" in capsys.readouterr().err


def test_correlation_with_depth() -> None:
    falling = torch.tensor([0.9, 0.8, 0.3, 0.2])
    assert bottom_up.by_depth(falling) == pytest.approx(-1)
    assert bottom_up.by_depth(-falling) == pytest.approx(1)
    assert bottom_up.by_depth(torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)
    assert bottom_up.by_depth(torch.tensor([NAN, 0.9, 0.5, 0.1])) == pytest.approx(-1)


def test_bottom_up_on_small_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bottom_up, "SEEDS", 2)
    monkeypatch.setattr(bottom_up, "DeepCNN", partial(bottom_up.DeepCNN, width=4))
    monkeypatch.setattr(bottom_up, "Digits", FewDigits)
    found = bottom_up.main(["--epochs", "2", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert len(found) == 2
    for curves in found:
        assert curves.layers == (*(f"blocks.{place}" for place in range(8)), "head")
        for nearness in (curves.nearness, curves.start):
            assert float(nearness.min()) > -0.1
            assert float(nearness.max()) <= 1
        moved = curves.own_way[~curves.own_way.isnan()]
        assert float(moved.max()) < 1
    tables = said[said.index("\nseed 0  ") :].split("\nseed ")[1:]
    assert len(tables) == 2
    for table, curves in zip(tables, found, strict=True):
        rows = [line.split() for line in table.splitlines()[1:11]]
        assert [row[0] for row in rows] == [*curves.layers, "with"]
        assert [float(row[1]) for row in rows[:-1]] == pytest.approx(curves.nearness.tolist(), abs=5e-4)
        assert rows[-1][2:] == [f"{bottom_up.by_depth(column):.2f}" for column in curves[1:]]
    assert (
        "Are lower layers nearer to their end all along? Yes"
        in bottom_up.remarks([falling_curves()] * 2, {"a": 1.0, "b": 0.5})[-2]
    )
    assert "Two untrained networks, from the first layer to the last:" in said


def falling_curves() -> bottom_up.Curves:
    falling, rising = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.1, 0.5, 0.9])
    return bottom_up.Curves(("a", "b", "c"), falling, rising, falling)


class FewDigits(bottom_up.Digits):
    """The demo's digits, 320 to train on and 64 to validate."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train, self.val = Subset(self.train, range(320)), Subset(self.val, range(64))
