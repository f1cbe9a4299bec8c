"""A run's folder: whole files, a readable history, clear errors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lightning_interp.similarity import CKA, SVCCA, prepare
from lightning_interp.similarity.results import Snapshot
from lightning_interp.storage.folder import Folder
from lightning_interp.storage.snapshots import new_store, open_store, snapshot_from_state, snapshot_state

FACTS = {"n": 40, "source": "test", "fingerprint": "f", "ids": list(range(40))}


def snapshot(step: int, seed: int = 0) -> Snapshot:
    generator = torch.Generator().manual_seed(seed)
    layers = {f"block.{i}#1": prepare(torch.randn(40, 3 + 60 * i, generator=generator)) for i in range(3)}
    return Snapshot(step // 10, step, layers)


def test_snapshots_come_back_exact_enough_for_every_measure(tmp_path: Path) -> None:
    store = new_store(Folder(str(tmp_path)), FACTS)
    taken = [snapshot(10, 1), snapshot(0, 2)]
    for one in taken:
        store.append(one)
    again = open_store(Folder(str(tmp_path)))
    assert again.steps == [0, 10]
    assert again.manifest["probe"] == FACTS
    read, other = again.read(10), again.read(0)
    assert (read.epoch, read.step, list(read.layers)) == (1, 10, list(taken[0].layers))
    for layer in read.layers:
        assert read.layers[layer].width == taken[0].layers[layer].width
        for measure in (CKA(), CKA(debiased=True), SVCCA(0.9)):
            stored = measure.between(read.layers[layer], other.layers[layer])
            exact = measure.between(taken[0].layers[layer], taken[1].layers[layer])
            assert float(stored) == pytest.approx(float(exact), abs=1e-6)


def test_a_folder_may_be_called_like_a_pattern(tmp_path: Path) -> None:
    for folder in (Folder(str(tmp_path / "lr=[0.1]")), Folder(f"memory://{tmp_path.name}/lr=[0.1]")):
        for file in ("similarity/section.html", "query-1.png", "query-2.png"):
            folder.write(file, "")
        assert folder.names("query-*.png") == ["query-1.png", "query-2.png"]
        assert folder.folders_with("section.html") == ["similarity"]


def test_a_step_is_replaced(tmp_path: Path) -> None:
    store = new_store(Folder(str(tmp_path)), FACTS)
    store.append(snapshot(10, 1))
    store.append(snapshot(10, 2))
    assert store.steps == [10]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path))
    folder.write("a/b.txt", "old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        folder.write("a/b.txt", "new")
    assert folder.read("a/b.txt") == b"old"
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_a_folder_in_memory_through_fsspec() -> None:
    folder = Folder("memory://test-run")
    store = new_store(folder, FACTS)
    store.append(snapshot(0))
    assert open_store(folder).steps == [0]
    assert not folder.exists("nothing")


def test_errors_are_named(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"expected a manifest\.json"):
        open_store(folder)
    folder.write("manifest.json", "{ cut off")
    with pytest.raises(ValueError, match="expected a manifest in JSON"):
        open_store(folder)
    folder.write("manifest.json", json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="expected format 2, got 99"):
        open_store(folder)
    with pytest.raises(KeyError, match="no snapshot of step 5"):
        new_store(folder, FACTS).read(5)


def test_a_state_survives_a_checkpoint(tmp_path: Path) -> None:
    taken = snapshot(10)
    torch.save(snapshot_state(taken), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = snapshot_from_state(state)
    assert (again.epoch, again.step) == (1, 10)
    for layer, representation in taken.layers.items():
        assert again.layers[layer].width == representation.width
        assert torch.allclose(again.layers[layer].s.double(), representation.s.double(), rtol=1e-6)


def gram_snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    layers = {f"layer{i}": prepare(torch.randn(64, 300 + i, generator=generator)).reduced("gram") for i in range(3)}
    return Snapshot(step, step, layers)


def test_gram_matrices_take_two_bytes_a_pair_and_serve_cka(tmp_path: Path) -> None:
    store = new_store(Folder(str(tmp_path)), FACTS)
    first, second = gram_snapshot(1), gram_snapshot(2)
    for one in (first, second):
        store.append(one)
    assert store.manifest["snapshots"][0]["bytes"] < 3 * 64 * 65 + 1000
    read, other = store.read(1), store.read(2)
    for layer in read.layers:
        for measure in (CKA(), CKA(debiased=True)):
            stored = float(measure.between(read.layers[layer], other.layers[layer]))
            exact = float(measure.between(first.layers[layer], second.layers[layer]))
            assert stored == pytest.approx(exact, abs=1e-5)
            own = float(measure.between(read.layers[layer], read.layers[layer]))
            assert own == pytest.approx(1, abs=1e-9)
        with pytest.raises(ValueError, match="half precision"):
            SVCCA().between(read.layers[layer], other.layers[layer])


def test_a_constant_layer_is_stored(tmp_path: Path) -> None:
    store = new_store(Folder(str(tmp_path)), FACTS)
    store.append(Snapshot(0, 0, {"dead": prepare(torch.ones(40, 300)).reduced("gram")}))
    dead = store.read(0).layers["dead"]
    assert CKA().between(dead, dead).isnan()


def test_layers_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(Folder(str(tmp_path)), FACTS)
    store.append(snapshot(0))
    size = store.manifest["snapshots"][0]["bytes"]
    fetched: list[int] = []
    read = Folder.read

    def counted(self: Folder, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        content = read(self, name, start, stop)
        fetched.append(len(content))
        return content

    monkeypatch.setattr(Folder, "read", counted)
    held = store.read(0)
    assert list(held.layers) == ["block.0#1", "block.1#1", "block.2#1"]
    assert held.layers["block.0#1"].width == 3
    assert sum(fetched) < size / 10


def test_thinning_keeps_the_ends_and_stays_even(tmp_path: Path) -> None:
    store = new_store(Folder(str(tmp_path)), FACTS)
    for step in range(0, 100, 10):
        store.append(snapshot(step, step))
    each = store.manifest["snapshots"][0]["bytes"]
    assert store.thin(20 * each) == []
    assert len(store.thin(5.5 * each)) == 5
    assert store.steps[0] == 0
    assert store.steps[-1] == 90
    gaps = [b - a for a, b in zip(store.steps, store.steps[1:], strict=False)]
    assert max(gaps) <= 2 * min(gaps) + 10
    assert open_store(Folder(str(tmp_path))).steps == store.steps
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    store.thin(0)
    assert store.steps == [0, 90]
