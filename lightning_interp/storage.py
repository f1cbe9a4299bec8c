"""A run's folder on disk: files written whole or not at all, snapshots listed in a manifest."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import fsspec
import torch
from safetensors.torch import save
from torch import Tensor

from lightning_interp.records import Snapshot
from lightning_interp.representation import Representation

FORMAT = 2
LARGEST = 2.0**14
DTYPES = {"F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Folder:
    """A local folder or an fsspec address (`s3://…`).

    Args:
        path: the folder; made at the first write.
    """

    path: str

    def file(self, name: str) -> str:
        """Return a file's path, `name` with forward slashes."""
        return posixpath.join(self.path, name)

    def folder(self, name: str) -> Folder:
        """Return a folder inside this one."""
        return Folder(self.file(name))

    def exists(self, name: str) -> bool:
        """Say whether a file is there."""
        system, path = fsspec.core.url_to_fs(self.file(name))
        return bool(system.exists(path))

    def write(self, name: str, data: bytes | str) -> str:
        """Write a file whole: a reader, or a kill at any moment, finds the old one or the new one.

        Returns:
            The file's path.
        """
        raw = data.encode() if isinstance(data, str) else data
        system, path = fsspec.core.url_to_fs(self.file(name))
        system.makedirs(system._parent(path), exist_ok=True)
        if not _is_local(system):
            system.pipe_file(path, raw)
            return self.file(name)
        partial = f"{path}.{os.getpid()}.partial"
        try:
            with open(partial, "wb") as handle:
                handle.write(raw)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.remove(partial)
        return self.file(name)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return a file's content, or its bytes from `start` to `stop`."""
        system, path = fsspec.core.url_to_fs(self.file(name))
        return bytes(system.cat_file(path, start, stop))

    def names(self, pattern: str) -> list[str]:
        """Return the names of the files in this folder that a glob pattern matches."""
        system, path = fsspec.core.url_to_fs(self.file(pattern))
        return [posixpath.basename(found) for found in system.glob(path)]

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        system, path = fsspec.core.url_to_fs(self.file(name))
        if system.exists(path):
            system.rm_file(path)


@dataclass(frozen=True)
class SnapshotStore:
    """A run's snapshots: one safetensors file each, and a manifest in JSON that lists them.

    Args:
        folder: where the files are.
        manifest: what the manifest holds; `open_store` reads it.
    """

    folder: Folder
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        """Optimizer steps at which snapshots were taken, ascending."""
        return [entry["step"] for entry in self.manifest["snapshots"]]

    @property
    def thinned(self) -> int:
        """Number of snapshots that were deleted to stay within a budget."""
        return int(self.manifest.get("thinned", 0))

    def tidy(self) -> None:
        """Delete snapshots in the folder that are not listed, of an earlier run in the same place."""
        listed = {entry["file"] for entry in self.manifest["snapshots"]}
        for name in self.folder.names("snapshot-*.safetensors"):
            if name not in listed:
                self.folder.remove(name)

    def append(self, snapshot: Snapshot) -> None:
        """Write a snapshot and list it; one of the same step is replaced."""
        name = f"snapshot-{snapshot.step:09d}.safetensors"
        held, facts = _packed(snapshot)
        content = save(held, {"format": str(FORMAT)})
        self.folder.write(name, content)
        others = [e for e in self.manifest["snapshots"] if e["step"] != snapshot.step]
        entry = {
            "file": name,
            "epoch": snapshot.epoch,
            "step": snapshot.step,
            "bytes": len(content),
            "layers": facts,
        }
        self.manifest["snapshots"] = sorted([*others, entry], key=lambda e: e["step"])
        self._write_manifest()

    def read(self, step: int) -> Snapshot:
        """Return the snapshot of one step, whose layers are read when they are asked for, and not kept.

        Raises:
            KeyError: there is none.
        """
        for entry in self.manifest["snapshots"]:
            if entry["step"] == step:
                return Snapshot(entry["epoch"], step, _StoredLayers(self.folder, entry["file"], entry["layers"]))
        raise KeyError(f"no snapshot of step {step} in {self.folder.path}; there are {self.steps}")

    def adopt(self, earlier: Iterable[Snapshot]) -> None:
        """Take over snapshots of the run that this one goes on with."""
        for snapshot in earlier:
            self.append(snapshot)

    def forget_after(self, step: int) -> None:
        """Delete the snapshots of later steps: a run that goes on from an earlier checkpoint takes them anew."""
        entries = self.manifest["snapshots"]
        self.manifest["snapshots"] = [entry for entry in entries if entry["step"] <= step]
        self._write_manifest()
        self.tidy()

    def thin(self, most_bytes: float) -> list[int]:
        """Delete snapshots until the rest fit, so that those left stay evenly spread; the first and the last stay.

        Returns:
            The steps whose snapshots were deleted.
        """
        removed: list[dict[str, Any]] = []
        entries = self.manifest["snapshots"]
        while len(entries) > 2 and sum(e["bytes"] for e in entries) > most_bytes:
            gaps = [after["step"] - before["step"] for before, after in zip(entries, entries[2:], strict=False)]
            removed.append(entries.pop(1 + gaps.index(min(gaps))))
        if removed:
            self.manifest["thinned"] = self.thinned + len(removed)
            self._write_manifest()
            for entry in removed:
                self.folder.remove(entry["file"])
        return [entry["step"] for entry in removed]

    def _write_manifest(self) -> None:
        self.folder.write("manifest.json", json.dumps(self.manifest, indent=1))


def open_store(folder: Folder) -> SnapshotStore:
    """Open the snapshots that a folder holds.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: the manifest is of another format or no JSON.
    """
    if not folder.exists("manifest.json"):
        raise FileNotFoundError(f"{folder.path}: expected a manifest.json with snapshots, found none")
    try:
        manifest = json.loads(folder.read("manifest.json"))
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder.file('manifest.json')}: expected a manifest in JSON, got {error}") from error
    if version != FORMAT:
        raise ValueError(f"{folder.file('manifest.json')}: expected format {FORMAT}, got {version}")
    return SnapshotStore(folder, manifest)


def new_store(folder: Folder, probe: Mapping[str, Any]) -> SnapshotStore:
    """Start an empty store.

    Args:
        folder: where to write.
        probe: facts about the samples that all snapshots show: `n`, `source`, `fingerprint`, `ids`.
    """
    store = SnapshotStore(folder, {"format": FORMAT, "probe": dict(probe), "snapshots": []})
    store._write_manifest()
    return store


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


def _is_local(system: Any) -> bool:
    protocol = system.protocol
    return "file" in (protocol if isinstance(protocol, (tuple, list)) else (protocol,))
