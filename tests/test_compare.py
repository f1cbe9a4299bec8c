"""Runs compared from their folders alone."""

from __future__ import annotations

import csv
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_interp import compare
from lightning_interp.cli import main
from lightning_interp.cli.compare import MEASURES
from lightning_interp.compare import correspondence_in_words, table_of
from lightning_interp.similarity import CCA, CKA, SVCCA, MutualKNN, Procrustes, RBFKernel, prepare
from lightning_interp.similarity.results import Snapshot
from lightning_interp.storage.folder import Folder
from lightning_interp.storage.snapshots import new_store

LAYERS = ("conv", "hidden", "head")


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs whose layers are each other's rotated, a third unrelated, a fourth on other samples."""
    generator = torch.Generator().manual_seed(0)

    def features() -> list[torch.Tensor]:
        return [torch.randn(60, width, generator=generator, dtype=torch.float64) for width in (8, 5, 3)]

    first, other = features(), features()
    rotated = [2 * x @ torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], dtype=x.dtype))[0] + 1 for x in first]
    paths = []
    for name, last, probe in (("a", first, "p"), ("b", rotated, "p"), ("c", other, "p"), ("d", first, "q")):
        path = tmp_path / name / "version_0"
        facts = {"n": 60, "source": "validation set", "fingerprint": probe, "ids": list(range(60))}
        store = new_store(Folder(str(path / "interp" / "similarity")), facts)
        for epoch, values in ((0, other), (1, last)):
            layers = {layer: prepare(x) for layer, x in zip(LAYERS, values, strict=True)}
            store.append(Snapshot(epoch, epoch * 10, layers))
        paths.append(path)
    return paths


def test_same_up_to_rotation(runs: list[Path]) -> None:
    found = compare(runs[0], runs[1], measures=[CKA(), Procrustes(angle=True)])
    assert found.runs == ("a", "b")
    (table,) = found.maps["CKA"]
    assert table.values.diagonal().tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    assert found.same_layers("CKA")["head"] == pytest.approx([1], abs=1e-6)
    assert found.correspondence("CKA") == 1
    assert found.correspondence("Procrustes_angle") == 1
    assert float(table.values[0, 2]) < 0.5


def test_several_runs_and_epochs(runs: list[Path]) -> None:
    found = compare(*runs[:3], measures=[CKA()])
    assert found.pairs == ((0, 1), (0, 2), (1, 2))
    values = found.same_layers("CKA")["conv"]
    assert values[0] == pytest.approx(1, abs=1e-6)
    assert max(values[1:]) < 0.6
    start = compare(runs[0], runs[2], measures=[CKA()], epochs=[0, 1])
    assert start.same_layers("CKA")["conv"] == pytest.approx([1], abs=1e-6)


def test_any_of_a_runs_folders_will_do(runs: list[Path]) -> None:
    for inner in ("interp", "interp/similarity"):
        assert compare(runs[0], runs[1] / inner).runs == ("a", "b")


def test_errors_are_named(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"same samples.*60 of the validation set.*with other values"):
        compare(runs[0], runs[3])
    with pytest.raises(ValueError, match="at least two, got 1"):
        compare(runs[0])
    with pytest.raises(FileNotFoundError, match="expected a run with snapshots"):
        compare(runs[0], tmp_path)
    with pytest.raises(ValueError, match=r"expected one of \[0, 1\].*got 7"):
        compare(runs[0], runs[1], epochs=7)
    with pytest.raises(ValueError, match="one for each of 2 runs, got 3"):
        compare(runs[0], runs[1], epochs=[0, 0, 0])


def test_the_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["compare", *map(str, runs[:3]), "--measure", "cka", "--measure", "procrustes", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "a & b" in said
    assert re.search(r"head +1\.000 ± 0\.000", said)
    assert "most similar layer has the same name" in said
    with open(out / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 9
    first = next(r for r in rows if r["layer_a"] == r["layer_b"] == "conv" and r["run_b"] == "b")
    assert float(first["similarity"]) == pytest.approx(1, abs=1e-5)
    pictures = sorted(out.glob("*.png"))
    assert len(pictures) == 6
    with Image.open(pictures[0]) as image:
        assert min(image.size) > 200
    assert list(out.glob("events.out*"))
    told = (out / "compare.md").read_text()
    assert re.search(r"\| head \| 1\.000 ± 0\.000 \|", told)
    assert told.count("most similar layer has the same name") == 2
    texts = EventAccumulator(str(out), size_guidance={"tensors": 0}).Reload().Tags()["tensors"]
    assert "compare/CKA/text_summary" in texts


def test_the_module_is_the_command(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "compare", str(runs[0]), str(runs[1]), "--measure", "cka"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("lightning_interp.cli", run_name="__main__")
    assert not end.value.code
    assert re.search(r"head +1\.000 ± 0\.000", capsys.readouterr().out)


def test_the_command_tells_an_error_in_one_line(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs[0]), str(runs[3])]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lightning-interp: runs: expected snapshots of the same samples")
    assert said.count("\n") == 1


def test_a_run_with_itself_is_numbered(runs: list[Path]) -> None:
    found = compare(runs[0], runs[0], measures=[CKA()], epochs=[0, 1])
    assert found.runs == ("1", "2")
    assert found.same_layers("CKA")["conv"][0] < 0.6


def test_each_number_has_its_doubt(runs: list[Path], tmp_path: Path) -> None:
    measures = [CKA(), CKA(debiased=True), SVCCA(0.9), SVCCA(0.9, "mean_squared")]
    found = compare(runs[0], runs[2], measures=measures)
    for measure in measures:
        (table,) = found.maps[measure.name]
        assert table.chance is not None
        assert table.standard_error is not None
        everywhere = measure not in (SVCCA(0.9),)
        assert bool(table.chance.diagonal().isfinite().all())
        assert bool(table.chance.isfinite().all()) is everywhere
        assert bool(table.standard_error.isfinite().all()) is isinstance(measure, CKA)
    unrelated = found.maps["CKA"][0]
    assert float((unrelated.values - unrelated.chance).abs().max()) < 0.1, "runs a and c share nothing"
    assert main(["compare", str(runs[0]), str(runs[2]), "--measure", "svcca", "--out", str(tmp_path / "out")]) == 0
    with open(tmp_path / "out" / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(bool(row["by_chance"]) == (row["layer_a"] == row["layer_b"]) for row in rows)


def test_what_a_run_did_not_keep_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(name: str, reading: str) -> Path:
        facts = {"n": 60, "source": "test", "fingerprint": "p", "ids": list(range(60)), "maps": reading}
        store = new_store(Folder(str(tmp_path / name)), facts)
        store.append(Snapshot(0, 0, {"conv": prepare(torch.randn(60, 400)).reduced("gram")}))
        return tmp_path / name

    a, b, c = run("a", "flatten"), run("b", "flatten"), run("c", "pool")
    assert compare(a, b, measures=[CKA()]).maps["CKA"][0].values.isfinite().all()
    with pytest.raises(
        ValueError, match=r"expected kinds of linear CKA, for which alone .* got SVCCA_0.99; name it in"
    ):
        compare(a, b, measures=[CKA(), SVCCA()])
    with pytest.warns(UserWarning, match="SVCCA_0.99 left out, for which a run kept too little"):
        found = compare(a, b)
    assert list(found.maps) == ["CKA_debiased", "CKA"]
    assert found.left_out == ("SVCCA_0.99",)
    assert main(["compare", str(a), str(b)]) == 0
    assert "SVCCA_0.99 is left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected the same maps= in RepresentationSimilarity"):
        compare(a, c, measures=[CKA()])


def stored(path: Path, ids: list[int], layers: dict[str, torch.Tensor], fingerprint: str = "p") -> Path:
    facts = {"n": len(ids), "source": "test", "fingerprint": fingerprint, "ids": ids}
    held = {layer: prepare(x) for layer, x in layers.items()}
    new_store(Folder(str(path)), facts).append(Snapshot(1, 10, held))
    return path


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([0, 1, 2], "another number of samples"),
        ([0, 1, 2, 3], "the same ids with other values"),
        ([3, 2, 1, 0], "the same ids in another order"),
        ([2, 3, 4, 5], "other ids, 2 of them shared"),
    ],
)
def test_how_probes_differ(ids: list[int], says: str, tmp_path: Path) -> None:
    a = stored(tmp_path / "a", [0, 1, 2, 3], {"conv": torch.randn(4, 2)})
    b = stored(tmp_path / "b", ids, {"conv": torch.randn(len(ids), 2)}, "q")
    with pytest.raises(ValueError, match=says):
        compare(a, b)


def test_what_is_not_defined_is_left_out_of_means_and_counted(tmp_path: Path) -> None:
    runs = [
        stored(tmp_path / name, list(range(30)), {"wide": torch.randn(30, 40), "thin": torch.randn(30, 3)})
        for name in "ab"
    ]
    found = compare(*runs, measures=[CCA()])
    rows = {row[0]: row[1] for row in table_of(found, "CCA_mean")}
    assert rows["wide"] == "–"
    assert rows["mean"] == f"{found.same_layers('CCA_mean')['thin'][0]:.3f} (1 of 2 layers)"
    assert rows["by chance"].endswith("(known for 1 of 2 layers)")
    assert correspondence_in_words(found, "CCA_mean") == (
        "most similar layer has the same name: 100%, over 1 of 2 layers with a value"
    )
    note = found.maps["CCA_mean"][0].note
    assert note.startswith("By chance layers of one name score")
    assert note.count("wide (") == 1, "what is said of both runs is said once"


def test_runs_without_a_logger_are_found(tmp_path: Path) -> None:
    for name in "ab":
        stored(tmp_path / name / "interp" / "20260101" / "similarity", list(range(9)), {"conv": torch.randn(9, 2)})
    assert compare(tmp_path / "a", tmp_path / "b" / "interp", measures=[CKA()]).maps["CKA"]
    stored(tmp_path / "b" / "interp" / "20260102" / "similarity", list(range(9)), {"conv": torch.randn(9, 2)})
    with pytest.raises(FileNotFoundError, match=r"there are .*20260101/similarity, .*20260102/similarity"):
        compare(tmp_path / "a", tmp_path / "b")


def test_the_command_knows_every_measure() -> None:
    wanted = [
        CCA("largest"),
        SVCCA(summary="mean_squared"),
        CKA(RBFKernel(), debiased=True),
        Procrustes(angle=True),
        MutualKNN(),
    ]
    assert all(measure in MEASURES.values() for measure in wanted)
