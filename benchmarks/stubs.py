"""Import another package although modules that it imports for other ends are missing."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

UNUSED = ("torchvision", "ttach")


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for missing modules that a peer imports and that nothing called here needs.

    Args:
        names: of the packages.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        unused = name.partition(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if unused else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return MagicMock(__path__=[])

    def exec_module(self, module: ModuleType) -> None:
        """Leave it as it is."""


def load(name: str, unused: Sequence[str] = UNUSED) -> Any:
    """Import a peer's module, the real thing where it is installed; packages without their `__init__`'s needs."""
    sys.meta_path.append(stubs := Stubs(unused))
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(stubs)
