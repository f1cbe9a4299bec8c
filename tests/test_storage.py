"""A run's folder: whole files, a readable history, clear errors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lightning_interp.records import Snapshot
from lightning_interp.similarity import CKA, SVCCA, prepare
from lightning_interp.storage import Folder, new_store, open_store, snapshot_from_state, snapshot_state

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
