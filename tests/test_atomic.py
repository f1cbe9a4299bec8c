"""A process that is killed while it writes leaves the file that was there before."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_interp.atomic import atomic_write
from lightning_interp.influence import InfluenceFunction
from lightning_interp.influence.curvature import ProjectedGaussNewton
from lightning_interp.influence.estimators.gradient_store import HEAD, GradientStore, stored
from lightning_interp.storage.folder import Folder


def kill_before_the_replacement() -> None:
    """From now on this process is killed when a written file should take the old one's place."""
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def write_twice(folder: Path) -> None:
    run_folder = Folder(str(folder))
    run_folder.write("manifest.json", "old")
    kill_before_the_replacement()
    run_folder.write("manifest.json", "new and longer")


def store_gradients_twice(folder: Path) -> None:
    net, data = torch.nn.Linear(4, 3), TensorDataset(torch.randn(20, 4), torch.arange(20) % 3)
    estimator = InfluenceFunction(ProjectedGaussNewton(8), damping=0.1)
    stored(estimator.fit(net, data), folder)
    shutil.copy(folder / HEAD, folder / "copy")
    with torch.no_grad():
        net.bias += 1
    kill_before_the_replacement()
    stored(estimator.fit(net, data), folder)


def run_until_killed(function: Callable[[Path], None], folder: Path) -> None:
    """Call `function` in a fork of this process: a new one would take seconds to import the package."""
    child = multiprocessing.get_context("fork").Process(target=function, args=(folder,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def test_a_killed_run_leaves_its_old_file(tmp_path: Path) -> None:
    run_until_killed(write_twice, tmp_path)
    assert (tmp_path / "manifest.json").read_text() == "old"


def test_a_killed_gradient_store_is_the_old_store(tmp_path: Path) -> None:
    run_until_killed(store_gradients_twice, tmp_path)
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
