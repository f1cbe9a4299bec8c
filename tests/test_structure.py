"""The arrows between the rooms point one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_interp

PACKAGE = Path(lightning_interp.__file__).parent
ROOMS = ("similarity", "attribution", "influence")
OUTER = ("lightning_interp.callbacks", "lightning_interp.report", "lightning_interp.figures", "lightning_interp.board")
GROUND = [
    "records.py",
    "task.py",
    "capture.py",
    "batch.py",
    "samples.py",
    "display.py",
    "layers.py",
    "layout.py",
    "probe.py",
]
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def broken(place: str, found: set[str]) -> set[str]:
    """Return the imports of a file that point the wrong way; `place` is its path inside the package."""
    room = place.split("/")[0] if "/" in place else ""
    bad: set[str] = set()
    if room != "callbacks" and place not in ("board.py", "__init__.py"):
        bad |= {name for name in found if name.split(".")[0] in ("lightning", "pytorch_lightning")}
        bad |= {name for name in found if name.startswith("lightning_interp.callbacks")}
    if room in ROOMS:
        others = tuple(f"lightning_interp.{other}" for other in ROOMS if other != room)
        bad |= {
            name
            for name in found
            if name.startswith((*others, *OUTER, "lightning_interp.storage", "lightning_interp.map_store"))
        }
    if place in (*GROUND, "folder.py", "step_store.py", "storage.py", "map_store.py"):
        bad |= {name for name in found if name.startswith((*OUTER, *(f"lightning_interp.{r}" for r in ROOMS)))}
    return bad


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    assert broken(file.relative_to(PACKAGE).as_posix(), set(imports(file.read_text()))) == set()


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("similarity/cka.py", "import lightning"),
        ("similarity/cka.py", "from lightning_interp.influence import EKFAC"),
        ("influence/gradients.py", "from lightning_interp import report"),
        ("records.py", "from lightning_interp.similarity import CKA"),
        ("figures.py", "from lightning_interp.callbacks import DataInfluence"),
    ],
)
def test_a_wrong_arrow_is_seen(place: str, line: str) -> None:
    assert broken(place, set(imports(line)))


def test_files_and_functions_stay_small() -> None:
    for file in FILES:
        source = file.read_text()
        assert len(source.splitlines()) <= 400, file
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert lines <= 50, f"{file}:{node.name}"


def test_public_names() -> None:
    assert lightning_interp.__all__ == [
        "DataInfluence",
        "Display",
        "InputAttribution",
        "RepresentationSimilarity",
        "Task",
        "compare",
    ]
