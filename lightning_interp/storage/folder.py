"""A run's folder on disk: files written whole or not at all."""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass
from typing import Any

import fsspec


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

    def folders_with(self, name: str) -> list[str]:
        """Return the names of the folders directly inside this one that hold a file of this name."""
        system, path = fsspec.core.url_to_fs(self.file(f"*/{name}"))
        return [posixpath.basename(posixpath.dirname(file)) for file in system.glob(path)]

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        system, path = fsspec.core.url_to_fs(self.file(name))
        if system.exists(path):
            system.rm_file(path)


def _is_local(system: Any) -> bool:
    protocol = system.protocol
    return "file" in (protocol if isinstance(protocol, (tuple, list)) else (protocol,))
