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

# Gram matrices are scaled to this largest entry before rounding to half precision: a quarter of its largest number,
# 65504, and far above 6e-5, below which it loses digits.
LARGEST_ENTRY = 2.0**14
# The types that a snapshot's numbers are stored in, by their names in a safetensors header.
DTYPES = {"F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class SnapshotStore(StepStore[Snapshot]):
    """A run's snapshots; each layer is read from disk at every access, so that a run of any length fits in memory."""

    prefix: ClassVar[str] = "snapshot"

    def packed(self, record: Snapshot) -> tuple[bytes, dict[str, Any]]:
        """Return a snapshot's file, and a description of each layer for the manifest."""
        tensors, descriptions = _pack_layers(record)
        return save(tensors, {"format": str(FORMAT)}), {"layers": descriptions}

    def unpacked(self, entry: Mapping[str, Any]) -> Snapshot:
        """Return a snapshot whose layers are read at access."""
        return Snapshot(entry["epoch"], entry["step"], _StoredLayers(self.folder, entry["file"], entry["layers"]))


open_store = SnapshotStore.open
new_store = SnapshotStore.start


def snapshot_state(snapshot: Snapshot) -> dict[str, Any]:
    """Return a snapshot as tensors and plain Python, which a checkpoint can hold."""
    tensors, descriptions = _pack_layers(snapshot)
    return {"epoch": snapshot.epoch, "step": snapshot.step, "layers": descriptions, "tensors": tensors}


def snapshot_from_state(state: Mapping[str, Any]) -> Snapshot:
    """Return the snapshot that `snapshot_state` returned the state of."""
    tensors = state["tensors"]
    layers = {layer: _unpack_layer(tensors[layer].cpu(), description) for layer, description in state["layers"].items()}
    return Snapshot(state["epoch"], state["step"], layers)


class _StoredLayers(Mapping[str, Representation]):
    """The layers of one safetensors file, in call order; an access reads that layer's bytes alone."""

    def __init__(self, folder: Folder, file: str, descriptions: Mapping[str, Mapping[str, Any]]) -> None:
        self._folder, self._file, self._descriptions = folder, file, descriptions

    def __getitem__(self, layer: str) -> Representation:
        start, header = self._header
        description = header[layer]
        first, last = description["data_offsets"]
        values = torch.empty(description["shape"], dtype=DTYPES[description["dtype"]])
        if values.numel():  # frombuffer refuses an empty buffer
            raw = bytearray(self._folder.read(self._file, start + first, start + last))
            values = torch.frombuffer(raw, dtype=values.dtype).reshape(description["shape"])
        return _unpack_layer(values, self._descriptions[layer])

    @cached_property
    def _header(self) -> tuple[int, dict[str, Any]]:
        """Return the offset of the first number, and the header: safetensors puts its length in the first 8 bytes."""
        start = 8 + int.from_bytes(self._folder.read(self._file, 0, 8), "little")
        return start, json.loads(self._folder.read(self._file, 8, start))

    def __iter__(self) -> Iterator[str]:
        return iter(self._descriptions)

    def __len__(self) -> int:
        return len(self._descriptions)


def _pack_layers(snapshot: Snapshot) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return each layer's numbers, and a description of them.

    Of a Gram matrix the lower triangle is stored, scaled (which CKA does not depend on) and in half precision. CKA
    stays exact to 1e-5, unless the vectors of a few samples are hundreds of times longer than the rest. It takes
    n (n + 1) bytes.
    """
    tensors, descriptions = {}, {}
    for layer, r in snapshot.layers.items():
        values = r.values.detach().cpu()
        if r.form == "gram":
            rows, columns = torch.tril_indices(r.n, r.n)
            largest = r.gram.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # 0 for a constant layer
            scaled = r.gram.cpu() * (LARGEST_ENTRY / largest).cpu()
            values = scaled[rows, columns].half()
        tensors[layer] = values.contiguous()
        descriptions[layer] = {"form": r.form, "width": r.width, "sketch": r.sketch, "signs": r.signs, "n": r.n}
    return tensors, descriptions


def _unpack_layer(values: Tensor, description: Mapping[str, Any]) -> Representation:
    if description["form"] == "gram":
        n = description["n"]
        rows, columns = torch.tril_indices(n, n)
        gram = values.new_empty(n, n)
        gram[rows, columns] = values
        gram[columns, rows] = values
        values = gram
    return Representation(
        values, description["form"], description["width"], description["sketch"], description["signs"]
    )
