"""Snapshots of all layers on disk: one safetensors file each, read lazily."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from safetensors.torch import save
from torch import Tensor

from lightning_interp.similarity.representation import Representation
from lightning_interp.similarity.results import Snapshot
from lightning_interp.storage.folder import Folder
from lightning_interp.storage.step_store import FORMAT, StepStore

__all__ = ["Folder", "SnapshotStore", "new_store", "open_store", "snapshot_from_state", "snapshot_state"]

LARGEST = 2.0**14
DTYPES = {"F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class SnapshotStore(StepStore[Snapshot]):
    """A run's snapshots, whose layers are read when they are asked for, and not kept."""

    prefix: ClassVar[str] = "snapshot"

    def packed(self, record: Snapshot) -> tuple[bytes, dict[str, Any]]:
        """Return a snapshot's file, and its layers' forms."""
        held, facts = _packed(record)
        return save(held, {"format": str(FORMAT)}), {"layers": facts}

    def unpacked(self, entry: Mapping[str, Any]) -> Snapshot:
        """Return a snapshot of layers that are read later."""
        return Snapshot(entry["epoch"], entry["step"], _StoredLayers(self.folder, entry["file"], entry["layers"]))


open_store = SnapshotStore.open
new_store = SnapshotStore.start


def snapshot_state(snapshot: Snapshot) -> dict[str, Any]:
    """Return a snapshot as tensors and plain Python, as a checkpoint may hold it."""
    held, facts = _packed(snapshot)
    return {"epoch": snapshot.epoch, "step": snapshot.step, "layers": facts, "tensors": held}


def snapshot_from_state(state: Mapping[str, Any]) -> Snapshot:
    """Return the snapshot that `snapshot_state` described."""
    layers = {layer: _unpacked(state["tensors"][layer].cpu(), facts) for layer, facts in state["layers"].items()}
    return Snapshot(state["epoch"], state["step"], layers)


class _StoredLayers(Mapping[str, Representation]):
    """The layers of one safetensors file, in call order; of the file no more is read than the layer asked for."""

    def __init__(self, folder: Folder, file: str, facts: Mapping[str, Mapping[str, Any]]) -> None:
        self._folder, self._file, self._facts = folder, file, facts

    def __getitem__(self, layer: str) -> Representation:
        start, header = self._header
        about = header[layer]
        first, last = about["data_offsets"]
        values = torch.empty(about["shape"], dtype=DTYPES[about["dtype"]])
        if values.numel():
            raw = bytearray(self._folder.read(self._file, start + first, start + last))
            values = torch.frombuffer(raw, dtype=values.dtype).reshape(about["shape"])
        return _unpacked(values, self._facts[layer])

    @cached_property
    def _header(self) -> tuple[int, dict[str, Any]]:
        """Return where the numbers start, and what the file's header says."""
        start = 8 + int.from_bytes(self._folder.read(self._file, 0, 8), "little")
        return start, json.loads(self._folder.read(self._file, 8, start))

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)


def _packed(snapshot: Snapshot) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return each layer's numbers, and what they are.

    Of a Gram matrix the lower half is kept, in half precision after scaling, which CKA does not see: it stays exact
    to 1e-5, unless single samples are hundreds of times longer than the rest, and takes n (n + 1) bytes.
    """
    held, facts = {}, {}
    for layer, r in snapshot.layers.items():
        values = r.values.detach().cpu()
        if r.form == "gram":
            rows, columns = torch.tril_indices(r.n, r.n)
            scaled = r.gram.cpu() * (LARGEST / r.gram.abs().max().clamp(min=torch.finfo(torch.float64).tiny)).cpu()
            values = scaled[rows, columns].half()
        held[layer] = values.contiguous()
        facts[layer] = {"form": r.form, "width": r.width, "sketch": r.sketch, "signs": r.signs, "n": r.n}
    return held, facts


def _unpacked(values: Tensor, facts: Mapping[str, Any]) -> Representation:
    if facts["form"] == "gram":
        n = facts["n"]
        rows, columns = torch.tril_indices(n, n)
        gram = values.new_empty(n, n)
        gram[rows, columns] = values
        gram[columns, rows] = values
        values = gram
    return Representation(values, facts["form"], facts["width"], facts["sketch"], facts["signs"])
