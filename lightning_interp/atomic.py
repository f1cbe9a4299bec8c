"""A local file replaced whole: a kill at any moment leaves the old content or the new."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a path to write to; when the block ends without an error, that file replaces `path`.

    Args:
        path: the file to replace or create, in a folder that exists.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "notes.txt")
    >>> with atomic_write(file) as partial:
    ...     _ = partial.write_text("all of it")
    ...     file.exists()
    False
    >>> file.read_text()
    'all of it'
    """
    # In the same folder, since a file is replaced atomically only within one file system; the process's id keeps
    # two processes that write the same file apart.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name with content that never reached the disk
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
