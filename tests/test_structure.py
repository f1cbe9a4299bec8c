"""The arrows between the rooms point one way, names are defined once, and files and functions stay small."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import lightning_interp

PACKAGE = Path(lightning_interp.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import the rooms on lower floors; the three sciences share one, and never import each other.
FLOORS = {
    "atomic": 0,
    "checks": 0,
    "progress": 0,
    "data": 1,
    "network": 2,
    "similarity": 3,
    "attribution": 3,
    "influence": 3,
    "storage": 4,
    "views": 5,
    "compare": 6,
    "callbacks": 6,
    "cli": 7,
    "": 8,  # the package's own names
}
LIGHTNING = ("lightning", "pytorch_lightning")


def room_of(path: str) -> str:
    """Return the room of a file, given its path inside the package."""
    first = path.split("/")[0].removesuffix(".py")
    return "" if first == "__init__" else first


@cache
def defined_in(module: str, name: str) -> str:
    """Return the module that really defines what `from module import name` gives, through any package's root."""
    parts = module.split(".")[1:]
    folder = PACKAGE.joinpath(*parts)
    if (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists():
        return f"{module}.{name}"
    if not (folder / "__init__.py").exists():
        return module
    for node in ast.parse((folder / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and name in [(a.asname or a.name) for a in node.names]:
            return defined_in(node.module, next(a.name for a in node.names if (a.asname or a.name) == name))
    return module


def imports(source: str) -> Iterator[str]:
    """Yield the modules that a file's imports lead to."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            inside = module.split(".")[0] == "lightning_interp"
            yield from (defined_in(module, alias.name) if inside else module for alias in node.names)


def wrong_arrows(path: str, source: str) -> list[str]:
    """Return the imports of a file that point upwards or sideways; `path` is its path inside the package."""
    room = room_of(path)
    wrong = []
    for module in imports(source):
        root, *rest = module.split(".")
        if root in LIGHTNING and room not in ("callbacks", "cli"):
            wrong.append(module)
        if root == "lightning_interp":
            other = rest[0] if rest else ""
            if other != room and FLOORS[other] >= FLOORS[room]:
                wrong.append(module)
    return wrong


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    assert wrong_arrows(file.relative_to(PACKAGE).as_posix(), file.read_text()) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("similarity/cka.py", "import lightning"),
        ("similarity/cka.py", "from lightning.pytorch import Trainer"),
        ("similarity/cka.py", "from lightning_interp import DataInfluence"),
        ("similarity/cka.py", "from lightning_interp import Task, Display"),
        ("similarity/cka.py", "import lightning_interp"),
        ("similarity/cka.py", "from lightning_interp.influence import EKFAC"),
        ("influence/gradients/reader.py", "from lightning_interp.views import report"),
        ("attribution/engine/sites.py", "def f():\n    from lightning_interp.storage.folder import Folder"),
        ("data/batch.py", "from lightning_interp.network.layout import Layout"),
        ("storage/folder.py", "from lightning_interp.views.canvas import png"),
        ("views/heat_map.py", "from lightning_interp.callbacks import DataInfluence"),
        ("callbacks/guard.py", "from lightning_interp.cli import main"),
        ("checks.py", "from lightning_interp.data.task import Task"),
    ],
)
def test_a_wrong_arrow_is_seen(path: str, line: str) -> None:
    assert wrong_arrows(path, line)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("similarity/cka.py", "from lightning_interp.data.batch import count_samples"),
        ("cli/influence.py", "from lightning_interp import DataInfluence"),
        ("callbacks/guard.py", "from lightning_interp.similarity import CKA"),
    ],
)
def test_a_right_arrow_passes(path: str, line: str) -> None:
    assert wrong_arrows(path, line) == []


def test_files_and_functions_stay_small() -> None:
    for file in FILES:
        source = file.read_text()
        assert len(source.splitlines()) <= 400, file
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert lines <= 50, f"{file}:{node.name}"


def test_names_are_defined_once() -> None:
    modules_by_name: dict[str, set[str]] = defaultdict(set)
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                modules_by_name[node.name].add(file.relative_to(PACKAGE).as_posix())
    assert {name: modules for name, modules in modules_by_name.items() if len(modules) > 1} == {}


# Words that say nothing of what a variable holds; a few are arguments that users know, or the field's own.
BARE_WORDS = frozenset(
    [
        "held",
        "found",
        "told",
        "said",
        "asked",
        "chosen",
        "given",
        "made",
        "kept",
        "shown",
        "seen",
        "drawn",
        "wanted",
        "named",
        "known",
        "moved",
        "read",
        "taken",
        "some",
        "few",
        "one",
        "other",
        "others",
        "rest",
        "more",
        "most",
        "place",
        "places",
        "where",
        "again",
        "same",
        "both",
        "part",
        "parts",
    ]
)


def bound_names(source: str) -> Iterator[str]:
    """Yield every name that a file's functions bind: arguments and assigned names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg) and node.arg not in ("self", "cls"):
            yield node.arg


def test_names_say_what_they_hold() -> None:
    names = [name for file in FILES for name in bound_names(file.read_text())]
    assert sum(name in BARE_WORDS for name in names) / len(names) < 0.01


def test_folders_stay_small() -> None:
    folders = {file.parent for file in FILES}
    assert {str(folder): count for folder in folders if (count := len(list(folder.glob("*.py")))) > 18} == {}


def test_public_names() -> None:
    assert lightning_interp.__all__ == [
        "DataInfluence",
        "Display",
        "InputAttribution",
        "RepresentationSimilarity",
        "Task",
        "compare",
    ]
