"""A run's folder, local or at an fsspec address: files written whole or not at all."""

from __future__ import annotations

import glob
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from lightning_interp.atomic import atomic_write


@dataclass(frozen=True)
class Folder:
    """A local folder or an fsspec address (`s3://…`).

    Args:
        path: of the folder, which is made at the first write.
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
        """Write a file atomically: a reader finds the old or the new content, even after a kill at any moment.

        Returns:
            The file's path.
        """
        content = data.encode() if isinstance(data, str) else data
        system, path = fsspec.core.url_to_fs(self.file(name))
        system.makedirs(system._parent(path), exist_ok=True)
        if _is_local(system):
            with atomic_write(Path(path)) as partial:
                partial.write_bytes(content)
        else:
            system.pipe_file(path, content)  # an object store shows an object only when all of it is there
        return self.file(name)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return a file's content, or its bytes from `start` to `stop`."""
        system, path = fsspec.core.url_to_fs(self.file(name))
        return bytes(system.cat_file(path, start, stop))

    def names(self, pattern: str) -> list[str]:
        """Return the names of the files in this folder that a glob pattern matches."""
        return [posixpath.basename(match) for match in self._matches(pattern)]

    def folders_with(self, name: str) -> list[str]:
        """Return the names of the folders directly inside this one that hold a file of this name."""
        return [posixpath.basename(posixpath.dirname(match)) for match in self._matches(f"*/{name}")]

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        system, path = fsspec.core.url_to_fs(self.file(name))
        if system.exists(path):
            system.rm_file(path)

    def _matches(self, pattern: str) -> list[str]:
        """Return the paths that a glob pattern matches in this folder, whose own path may hold brackets and stars."""
        system, path = fsspec.core.url_to_fs(self.path)
        return list(system.glob(f"{glob.escape(path)}/{pattern}"))


def _is_local(system: Any) -> bool:
    protocol = system.protocol
    return "file" in (protocol if isinstance(protocol, (tuple, list)) else (protocol,))
