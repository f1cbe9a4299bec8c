"""A process that is killed while it writes leaves the file that was there before."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_interp.atomic import atomic_write
from lightning_interp.influence.estimators.gradient_store import HEAD, GradientStore

KILLED_BEFORE_THE_REPLACEMENT = "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
FOLDER = f"""
import os, signal, sys
from lightning_interp.storage.folder import Folder
folder = Folder(sys.argv[1])
folder.write("manifest.json", "old")
{KILLED_BEFORE_THE_REPLACEMENT}
folder.write("manifest.json", "new and longer")
"""
GRADIENTS = f"""
import os, shutil, signal, sys
import torch
from torch.utils.data import TensorDataset
from lightning_interp.influence import InfluenceFunction
from lightning_interp.influence.curvature import ProjectedGaussNewton
from lightning_interp.influence.estimators.gradient_store import HEAD, stored
net, data = torch.nn.Linear(4, 3), TensorDataset(torch.randn(20, 4), torch.arange(20) % 3)
estimator = InfluenceFunction(ProjectedGaussNewton(8), damping=0.1)
stored(estimator.fit(net, data), sys.argv[1])
shutil.copy(os.path.join(sys.argv[1], HEAD), os.path.join(sys.argv[1], "copy"))
with torch.no_grad():
    net.bias += 1
{KILLED_BEFORE_THE_REPLACEMENT}
stored(estimator.fit(net, data), sys.argv[1])
"""


def run_until_killed(script: str, folder: Path) -> None:
    child = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr


def test_a_killed_run_leaves_its_old_file(tmp_path: Path) -> None:
    run_until_killed(FOLDER, tmp_path)
    assert (tmp_path / "manifest.json").read_text() == "old"


def test_a_killed_gradient_store_is_the_old_store(tmp_path: Path) -> None:
    run_until_killed(GRADIENTS, tmp_path)
    assert (tmp_path / HEAD).read_bytes() == (tmp_path / "copy").read_bytes()
    assert len(GradientStore.open(tmp_path).self_influence()) == 20


def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "numbers"
    file.write_text("old")

    def write_until_the_disk_is_full() -> None:
        with atomic_write(file) as partial:
            partial.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_until_the_disk_is_full()
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["numbers"]
