"""The end of a training run, run again from its checkpoint."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ProgressBar

from lightning_interp.callbacks.influence.checkpoint import CheckpointContent, weights_only

MUTED = ("on_fit_start", "on_train_start", "on_train_end", "on_fit_end", "teardown", "configure_callbacks")


class _NoStep(Callback):
    """Ends training before its first batch.

    Args:
        trained: the parameters that had gradients when the checkpoint was written; those that have them now when None.
    """

    def __init__(self, trained: Collection[str] | None) -> None:
        self.trained = trained

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = True
        if self.trained is not None:
            for name, parameter in pl_module.named_parameters():
                parameter.requires_grad_(name in self.trained)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        raise ValueError("module: expected training to end before its first batch, but it continues; no step was taken")


def run_folder_of(path: str | os.PathLike[str]) -> str:
    """Return the folder of the run that a checkpoint lies in.

    >>> run_folder_of("logs/version_0/checkpoints/last.ckpt"), run_folder_of("last.ckpt"), run_folder_of("s3://runs/a/last.ckpt")
    ('logs/version_0', '.', 's3://runs/a')
    """
    folder, _, _ = os.fspath(path).replace(os.sep, "/").rpartition("/")
    return (folder.removesuffix("checkpoints").rstrip("/") if PurePath(folder).name == "checkpoints" else folder) or "."


def replay_end(
    callback: Callback,
    module: Any,
    data: CheckpointContent,
    path: str | os.PathLike[str],
    content: CheckpointContent,
    folder: str,
    device: str = "auto",
    precision: Any = "32-true",
    trusted: bool = False,
    trained: Collection[str] | None = None,
) -> None:
    """Let a callback start and end a training run that takes no step, its state that of a checkpoint.

    A trainer of Lightning's brings back weights, optimizers, counters and data, so that the callback finds the state
    that it found at the end of the run. What the network itself does at the start and the end of a run is left out,
    since it may load, log or save, as are its other callbacks.

    Args:
        callback: all of whose work is in `on_train_start` and `on_train_end`.
        module: with the checkpoint's weights.
        data: keywords for `Trainer.fit`.
        path: the checkpoint.
        content: what it holds.
        folder: the run's, where TensorBoard's events and the callback's files go.
        device: "auto", "cpu", "cuda", "cuda:1", "mps", ...
        precision: the trainer's.
        trusted: whether arbitrary objects in the checkpoint may be unpickled.
        trained: names of the parameters that had gradients then; those that have them now when None.

    Raises:
        ValueError: there is no such device or precision, or no training data.
    """
    package = importlib.import_module(_package(module))
    wrong = package.utilities.exceptions.MisconfigurationException
    with _muted(module), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        warnings.filterwarnings("ignore", category=package.utilities.warnings.PossibleUserWarning)
        try:
            trainer = _trainer(package, [_NoStep(trained), ProgressBar(), callback], folder, content, device, precision)
        except (ValueError, wrong) as error:
            raise ValueError(f"device, precision: {_one_line(error)}") from error
        resumed: CheckpointContent = {}
        if "optimizer_states" in content:
            resumed = {"ckpt_path": os.fspath(path)} | weights_only(trainer.fit, trusted)
        elif "loops" in content:  # Lightning resumes from no file without optimizers
            trainer.fit_loop.load_state_dict(content["loops"]["fit_loop"])
        try:
            trainer.fit(module, **data, **resumed)
        except wrong as error:
            raise ValueError(f"module, data: {_one_line(error)}") from error
        except ValueError as error:
            if "loaded state dict" not in str(error):
                raise
            raise ValueError(
                f"module: the checkpoint's optimizers do not fit those of {type(module).__name__}, which a callback may"
                f" have changed during training: {_one_line(error)}"
            ) from error


def _trainer(
    package: Any, callbacks: list[Callback], folder: str, content: CheckpointContent, device: str, precision: Any
) -> Any:
    name, _, number = device.partition(":")
    return package.Trainer(
        accelerator=name,
        devices=[int(number)] if number else 1,
        precision=precision,
        logger=package.loggers.TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        default_root_dir=folder,
        callbacks=callbacks,
        # Lightning ignores `should_stop` until these are reached.
        min_epochs=0,
        min_steps=0,
        # Beyond those of the checkpoint, or there would be no training to start.
        max_epochs=int(content.get("epoch", 0)) + 2,
        max_steps=int(content.get("global_step", 0)) + 1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def _muted(module: Any) -> Iterator[None]:
    """Keep a network from what it does around a run: it may load weights, save, log or upload."""
    own_attributes = {name: vars(module)[name] for name in MUTED if name in vars(module)}
    for name in MUTED:
        setattr(module, name, lambda *_, **__: [])
    try:
        yield
    finally:
        for name in MUTED:
            delattr(module, name)
        vars(module).update(own_attributes)


def _package(module: Any) -> str:
    """Return the one of Lightning's two packages that a network is of, whose trainer alone takes it."""
    old = any(kind.__module__.startswith("pytorch_lightning.") for kind in type(module).__mro__)
    return "pytorch_lightning" if old else "lightning.pytorch"
