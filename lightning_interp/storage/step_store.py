"""One file for each recorded moment of a run, and a manifest in JSON that lists them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from lightning_interp.storage.folder import Folder

FORMAT = 2  # of the manifest; raised when a reader of the old one would misread the new one


class Moment(Protocol):
    """What a file records: one moment of training."""

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""


R = TypeVar("R", bound=Moment)


@dataclass(frozen=True)
class StepStore(ABC, Generic[R]):
    """One safetensors file for each recorded moment, listed in a manifest.

    Args:
        folder: where the files are.
        manifest: what the manifest holds: `format`, facts on the `probe`, and the list of `snapshots`.
    """

    folder: Folder
    manifest: dict[str, Any] = field(default_factory=dict)
    prefix: ClassVar[str]

    @abstractmethod
    def packed(self, record: R) -> tuple[bytes, dict[str, Any]]:
        """Return a file's content, and what the manifest lists of it."""

    @abstractmethod
    def unpacked(self, entry: Mapping[str, Any]) -> R:
        """Return the record that an entry of the manifest lists."""

    @property
    def steps(self) -> list[int]:
        """Optimizer steps of the recorded moments, ascending."""
        return [entry["step"] for entry in self.manifest["snapshots"]]

    @property
    def thinned(self) -> int:
        """Number of moments that were deleted to stay within a budget."""
        return int(self.manifest.get("thinned", 0))

    def tidy(self) -> None:
        """Delete files in the folder that are not listed, of an earlier run in the same place."""
        listed = {entry["file"] for entry in self.manifest["snapshots"]}
        for name in self.folder.names(f"{self.prefix}-*.safetensors"):
            if name not in listed:
                self.folder.remove(name)

    def append(self, record: R) -> None:
        """Write a moment and list it; one of the same step is replaced."""
        name = f"{self.prefix}-{record.step:09d}.safetensors"
        content, facts = self.packed(record)
        self.folder.write(name, content)
        other_steps = [e for e in self.manifest["snapshots"] if e["step"] != record.step]
        entry = {"file": name, "epoch": record.epoch, "step": record.step, "bytes": len(content), **facts}
        self.manifest["snapshots"] = sorted([*other_steps, entry], key=lambda e: e["step"])
        self._write_manifest()

    def read(self, step: int) -> R:
        """Return the record of one step.

        Raises:
            KeyError: there is nothing.
        """
        for entry in self.manifest["snapshots"]:
            if entry["step"] == step:
                return self.unpacked(entry)
        raise KeyError(f"no {self.prefix} of step {step} in {self.folder.path}; there are {self.steps}")

    def adopt(self, earlier: Iterable[R]) -> None:
        """Copy moments from the run that this one resumes."""
        for record in earlier:
            self.append(record)

    def forget_after(self, step: int) -> None:
        """Delete later steps: a run that resumes from an earlier checkpoint records them anew."""
        entries = self.manifest["snapshots"]
        self.manifest["snapshots"] = [entry for entry in entries if entry["step"] <= step]
        self._write_manifest()
        self.tidy()

    def thin(self, most_bytes: float) -> list[int]:
        """Delete moments until the rest fit, so that those left stay evenly spread; the first and the last stay.

        Returns:
            The steps that were deleted.
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

    @classmethod
    def open(cls, folder: Folder) -> Self:
        """Open what a folder holds.

        Raises:
            FileNotFoundError: there is no manifest.
            ValueError: the manifest is of another format or no JSON.
        """
        if not folder.exists("manifest.json"):
            raise FileNotFoundError(f"{folder.path}: expected a manifest.json with {cls.prefix}s, found none")
        try:
            manifest = json.loads(folder.read("manifest.json"))
            version = manifest["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder.file('manifest.json')}: expected a manifest in JSON, got {error}") from error
        if version != FORMAT:
            raise ValueError(f"{folder.file('manifest.json')}: expected format {FORMAT}, got {version}")
        return cls(folder, manifest)

    @classmethod
    def start(cls, folder: Folder, probe: Mapping[str, Any]) -> Self:
        """Start an empty store.

        Args:
            folder: where to write.
            probe: facts about the samples that all moments show: `n`, `source`, `fingerprint`, `ids`.
        """
        store = cls(folder, {"format": FORMAT, "probe": dict(probe), "snapshots": []})
        store._write_manifest()
        return store

    @classmethod
    def resume(
        cls, folder: Folder, probe: Mapping[str, Any], step: int, earlier: Folder | None, first: R | None = None
    ) -> Self:
        """Return the store of a run that starts, or that resumes from a checkpoint.

        The history of the run that it resumes is taken up to the checkpoint's step: in place where that run had
        the same folder, else as a copy.

        Args:
            folder: where to write.
            probe: facts about the samples (see `start`).
            step: optimizer steps taken so far.
            earlier: the store's folder in the run that this one resumes; None for a run that starts.
            first: the moment that a history begins with, even where the earlier folder is gone.
        """
        history = cls.open(earlier) if earlier is not None and earlier.exists("manifest.json") else None
        if history is not None and history.folder == folder:
            history.forget_after(step)
            return history
        store = cls.start(folder, probe)
        store.tidy()
        if first is not None:
            store.append(first)
        if history is not None:
            after = -1 if first is None else first.step
            store.adopt(history.read(s) for s in history.steps if after < s <= step)
        return store

    def _write_manifest(self) -> None:
        self.folder.write("manifest.json", json.dumps(self.manifest, indent=1))
