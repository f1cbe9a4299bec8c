"""Influence from a checkpoint, where hooks of the network and other callbacks had a part in the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn

from lightning_interp import DataInfluence
from lightning_interp.callbacks.influence.replay import _NoStep
from lightning_interp.cli import main
from tests.models import Net, loaders, trainer

HERE = __name__


class Starts(Net):
    """Loads weights and lets training go on at its start; saves at its end."""

    def on_fit_start(self) -> None:
        nn.init.constant_(self.conv1.weight, 0.1)

    def on_train_start(self) -> None:
        nn.init.constant_(self.head.weight, 0.1)
        self.trainer.should_stop = False

    def teardown(self, stage: str) -> None:
        ENDED.append(stage)


class Freezes(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.get_submodule("conv1").requires_grad_(False)


class Cycled(Net):
    """Its schedule goes by the trainer's steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.trainer.max_steps)]


class Grown(Net):
    """Made in `configure_model`; more is saved than it has."""

    strict_loading = False

    def __init__(self) -> None:
        super().__init__()
        self.head = None

    def configure_model(self) -> None:
        self.head = self.head or nn.Linear(6, 3)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["more"] = torch.zeros(1)


class Built(Net):
    """Made in `configure_model`."""

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            self.head = nn.Linear(6, 3)


class Backboned(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(1, 1, 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), 0.05)


ENDED: list[str] = []


def grown() -> Grown:
    return Grown()


def built() -> Built:
    net = Built()
    del net.head
    return net


def run(folder: Path, module: L.LightningModule, *others: L.Callback, **options: Any) -> tuple[Path, Path]:
    """Return the scores' table of a training run, and its checkpoint."""
    kept = ModelCheckpoint(filename="kept")
    callbacks = [DataInfluence(queries=2, on_error="raise"), *others, kept]
    fit = trainer(folder, callbacks=callbacks, enable_checkpointing=True, **options)
    fit.fit(module, *loaders())
    return Path(fit.log_dir) / "interp" / "influence" / "influence.csv", Path(kept.best_model_path)


def again(checkpoint: Path, module: str) -> int:
    data = ("--data", "tests.models:loaders", "--queries", "2", "--device", "cpu")
    return main(["influence", str(checkpoint), "--module", module, *data])


@pytest.mark.parametrize(
    ("network", "name", "others", "options"),
    [
        (Starts, "Starts", (), {}),
        (Net, "Freezing", (Freezes(),), {}),
        (Cycled, "Cycled", (), {"max_epochs": -1, "max_steps": 7}),
        (Grown, "grown", (), {}),
        (Built, "built", (), {}),
    ],
)
def test_the_numbers_are_those_of_the_run(
    network: type[Net], name: str, others: tuple[Any, ...], options: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    scores, checkpoint = run(tmp_path, network(), *others, **options)
    before = scores.read_bytes()
    scores.unlink()
    ENDED.clear()
    monkeypatch.setenv("PL_TRAINER_MIN_EPOCHS", "9")
    assert again(checkpoint, "tests.models:Net" if name == "Freezing" else f"{HERE}:{name}") == 0
    assert scores.read_bytes() == before
    assert not ENDED


def test_no_step_is_taken_even_so() -> None:
    with pytest.raises(ValueError, match="expected training to end before its first batch"):
        _NoStep(None).on_train_batch_start(None, None, None, 0)  # type: ignore[arg-type]


def test_optimizers_that_a_callback_changed_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetuning = BackboneFinetuning(1, lambda _: 1.0)
    scores, checkpoint = run(tmp_path, Backboned(), finetuning)
    before = scores.read_bytes()
    assert again(checkpoint, f"{HERE}:Backboned") == 2
    assert "the checkpoint's optimizers do not fit those of Backboned" in capsys.readouterr().err
    assert scores.read_bytes() == before
