"""The experiment on who converges first runs from the callback's files, and counts rightly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from callbacks_demo import bottom_up
from callbacks_demo.bottom_up import Curves, by_depth, main, remarks, table


def test_correlations_are_with_depth_over_known_layers() -> None:
    assert by_depth(torch.tensor([0.9, 0.8, 0.5, 0.1])) == pytest.approx(-1)
    assert by_depth(torch.tensor([torch.nan, 0.1, 0.5, 0.9])) == pytest.approx(1)
    assert by_depth(torch.tensor([0.9, 0.8, 0.1, 0.5])) == pytest.approx(-0.8)


def test_the_table_says_what_the_curves_are() -> None:
    curves = Curves(("low", "high"), torch.tensor([0.9, 0.4]), torch.tensor([0.3, 0.6]), torch.tensor([0.8, 0.1]))
    lines = table(0, curves)
    assert lines[1].split() == ["low", "0.900", "0.300", "0.800"]
    assert lines[-1].split() == ["with", "depth", "-1.00", "1.00", "-1.00"]
    said = "\n".join(remarks([curves, curves], {"low": 0.9, "high": 0.7}))
    assert "0.90 0.70 (-1.00 with depth)" in said
    assert "-1.00 to -1.00 with depth" in said


def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bottom_up, "SEEDS", 2)
    found = main(["--epochs", "2", "--folder", str(tmp_path)])
    assert len(found) == 2
    for curves in found:
        assert curves.layers == (*(f"blocks.{i}" for i in range(8)), "head")
        assert bool(((curves.nearness > 0) & (curves.nearness <= 1)).all())
        assert by_depth(curves.start) < -0.8
        assert float(curves.start[0]) > float(curves.start[-1]) + 0.3
    assert capsys.readouterr().out.count("with depth  ") == 2
    assert len(list(tmp_path.glob("seed_?/**/similarity/manifest.json"))) == 2
