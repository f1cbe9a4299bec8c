"""The main job itself, and the wheel that carries the package."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path = ROOT) -> str:
    """Run a command without this process's own search path, which could offer the package a second time."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_demo_learns_and_says_where_to_look(tmp_path: Path) -> None:
    said = run(sys.executable, "-m", "callbacks_demo", "--folder", str(tmp_path))
    accuracy = float(said.split("validation accuracy ")[1].split("%")[0])
    assert accuracy > 95
    assert "--samples_per_plugin images=1000" in said
    told = [Path(line.strip()) for line in said.splitlines() if line.strip().endswith((".html", ".csv"))]
    assert len(told) == 2
    for path in told:
        assert path.stat().st_size > 10_000
    interp = told[0].parent
    assert len(list(interp.glob("similarity/snapshot-*.safetensors"))) == 7
    assert len(list(interp.glob("similarity/*.png"))) == 21
    assert len(list(interp.glob("attribution/*.png"))) == 32
    assert len(list(interp.glob("influence/query-*.png"))) == 6
    head = told[1].read_text().splitlines()[1].split(",")
    assert head[1] != head[2], "the first query is a wrong answer"


def test_the_wheel_installs_and_imports_alone(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0].split("-")[0] for n in names} == {"lightning_interp"}
    for needed in ("lightning_interp/py.typed", "lightning_interp/views/templates/report.html.jinja"):
        assert needed in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    # Dependencies come from this environment through a path file; the package comes from the wheel alone.
    venv.create(tmp_path / "venv", with_pip=False)
    python = str(tmp_path / "venv" / "bin" / "python")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(str(Path(pytest.__file__).parents[1]))
    code = "import lightning_interp as i; print(i.__file__, i.__all__)"
    said = run(python, "-c", code, cwd=tmp_path)
    assert str(site) in said
    assert "DataInfluence" in said
