"""The callbacks under LightningCLI: all of their arguments can be written on a command line."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI

from lightning_interp import DataInfluence, InputAttribution, RepresentationSimilarity, Task
from lightning_interp.influence import InfluenceFunction
from tests.models import Net


def parsed(tmp_path: Path, callback: str, *arguments: str) -> Callback:
    args = ["--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    args += ["--trainer.callbacks", f"lightning_interp.{callback}", *arguments]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's use of jsonargparse is deprecated
        cli = LightningCLI(Net, run=False, args=args, save_config_callback=None)
    (found,) = [held for held in cli.trainer.callbacks if type(held).__name__ == callback]
    return found


@pytest.mark.parametrize("kind", [DataInfluence, InputAttribution, RepresentationSimilarity])
def test_defaults_are_those_of_python(kind: type[Callback], tmp_path: Path) -> None:
    found = parsed(tmp_path, kind.__name__)
    assert isinstance(found, kind)
    assert found.task == Task()  # type: ignore[attr-defined]
    assert found.state_key == kind().state_key


def test_arguments_of_arguments(tmp_path: Path) -> None:
    given = {
        "queries": "2",
        "retrain": "last_layer",
        "task.kind": "classes",
        "task.loss": "tests.test_lightning_cli.loss",
        "estimator": "lightning_interp.influence.InfluenceFunction",
        "estimator.damping": "0.01",
    }
    found = parsed(tmp_path, "DataInfluence", *(f"--trainer.callbacks.{name}={value}" for name, value in given.items()))
    assert isinstance(found, DataInfluence)
    assert (found.queries, found.retrain, found.task) == (2, "last_layer", Task(loss=loss, kind="classes"))
    assert isinstance(found.estimator, InfluenceFunction)
    assert found.estimator.damping == 0.01


def loss(outputs: object, targets: object) -> object:
    raise NotImplementedError
