"""A run's folder on disk: files written whole or not at all, snapshots listed in a manifest."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import fsspec
import torch
from safetensors.torch import load, save
from torch import Tensor

from lightning_interp.records import Representation, Snapshot

FORMAT = 1


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

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        system, path = fsspec.core.url_to_fs(self.file(name))
        return bytes(system.cat_file(path))


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

    def append(self, snapshot: Snapshot) -> None:
        """Write a snapshot and list it; one of the same step is replaced."""
        name = f"snapshot-{snapshot.step:09d}.safetensors"
        self.folder.write(name, save(_tensors(snapshot), {"format": str(FORMAT)}))
        others = [e for e in self.manifest["snapshots"] if e["step"] != snapshot.step]
        entry = {
            "file": name,
            "epoch": snapshot.epoch,
            "step": snapshot.step,
            "layers": {layer: r.width for layer, r in snapshot.layers.items()},
        }
        self.manifest["snapshots"] = sorted([*others, entry], key=lambda e: e["step"])
        self._write_manifest()

    def read(self, step: int) -> Snapshot:
        """Return the snapshot of one step.

        Raises:
            KeyError: there is none.
        """
        for entry in self.manifest["snapshots"]:
            if entry["step"] == step:
                held = load(self.folder.read(entry["file"]))
                layers = {
                    layer: Representation(held[f"{layer}:u"], held[f"{layer}:s"], width)
                    for layer, width in entry["layers"].items()
                }
                return Snapshot(entry["epoch"], entry["step"], layers)
        raise KeyError(f"no snapshot of step {step} in {self.folder.path}; there are {self.steps}")

    def adopt(self, earlier: Iterable[Snapshot]) -> None:
        """Take over snapshots of the run that this one goes on with."""
        for snapshot in earlier:
            self.append(snapshot)

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
    return {
        "epoch": snapshot.epoch,
        "step": snapshot.step,
        "widths": {layer: r.width for layer, r in snapshot.layers.items()},
        "tensors": _tensors(snapshot),
    }


def snapshot_from_state(state: Mapping[str, Any]) -> Snapshot:
    """Return the snapshot that `snapshot_state` described."""
    held = state["tensors"]
    layers = {
        layer: Representation(held[f"{layer}:u"].cpu(), held[f"{layer}:s"].cpu(), width)
        for layer, width in state["widths"].items()
    }
    return Snapshot(state["epoch"], state["step"], layers)


def _tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    for layer, r in snapshot.layers.items():
        held[f"{layer}:u"] = r.u.detach().to("cpu", torch.float32).contiguous()
        held[f"{layer}:s"] = r.s.detach().to("cpu", torch.float32).contiguous()
    return held


def _is_local(system: Any) -> bool:
    protocol = system.protocol
    return "file" in (protocol if isinstance(protocol, (tuple, list)) else (protocol,))
