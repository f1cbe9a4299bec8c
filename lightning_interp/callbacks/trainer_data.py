"""A trainer's data, device, precision and progress bar, reached without changing the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_interp.checks import ArgumentError
from lightning_interp.data.batch import at_least_float32, slice_samples
from lightning_interp.data.dataset_rng import preserve_dataset_rng
from lightning_interp.data.samples import Samples
from lightning_interp.data.task import SAMPLES_TO_SETTLE, Task, settle_kind
from lightning_interp.network.weights import loaded
from lightning_interp.progress import Progress, bar, quiet


class Source(NamedTuple):
    """Where samples come from, and its name in words."""

    samples: Samples | Iterable[Any]
    name: str


@contextmanager
def validating(trainer: pl.Trainer) -> Iterator[None]:
    """Let the user's data hooks see a trainer that validates, so that none of them augments."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


def validation_source(trainer: pl.Trainer, owner: str) -> Source:
    """Return the first validation loader's dataset; the training set, with a warning, if there is none."""
    loaders = _validation_loaders(trainer)
    if loaders:
        return Source(_read(trainer, loaders[0], f"{owner}(probe=...)"), "validation set")
    rank_zero_warn(f"{owner}: there is no validation loader, so the samples shown come from the training set")
    return training_source(trainer, owner)


def training_source(trainer: pl.Trainer, owner: str) -> Source:
    """Return the first training loader's dataset."""
    return Source(_read(trainer, _flat(trainer.train_dataloader)[0], f"{owner}(probe=...)"), "training set")


def evaluation_source(trainer: pl.Trainer, stage: str) -> Source:
    """Return the first loader's dataset of `trainer.validate` or `trainer.test`.

    Raises:
        ValueError: there is no loader, or it cannot be read twice.
    """
    loaders = _flat(trainer.test_dataloaders if stage == "test" else trainer.val_dataloaders)
    if not loaders:
        raise ValueError(f"expected a loader to {stage} with, got none")
    return Source(_read(trainer, loaders[0], "probe"), "test set" if stage == "test" else "validation set")


def given_samples(trainer: pl.Trainer, dataset: Any) -> Samples:
    """Return the user's own dataset or loader; a dataset is read with the training loader's batch size and collate."""
    loader = next(iter(_flat(trainer.train_dataloader)), None)
    samples = Samples.of(dataset, move=mover(trainer))
    if isinstance(dataset, DataLoader) or not isinstance(loader, DataLoader) or not _indexed(loader):
        return samples
    return dataclasses.replace(Samples.of(loader, move=samples.move), dataset=samples.dataset)


def with_ids(samples: Samples, ids: Sequence[int]) -> Samples:
    """Return the samples with these dataset indices.

    Raises:
        ArgumentError: an index is not one of the data set's.
    """
    positions = {index: position for position, index in enumerate(samples.ids)}
    if not ids or (missing := [index for index in ids if index not in positions]):
        got = ", ".join(map(str, missing[:8])) if ids else "none"
        examples = ", ".join(map(str, list(positions)[:3]))
        raise ArgumentError(
            f"query: expected dataset indices of the {len(positions):,} validation samples ({examples}, ...), got {got}"
        )
    return samples.at([positions[index] for index in dict.fromkeys(ids)])


def indexed_training_set(trainer: pl.Trainer) -> Samples:
    """Return the training dataset, in the order of its indices.

    Raises:
        ValueError: there are several training loaders, or samples have no indices.
    """
    loaders = _flat(trainer.train_dataloader)
    if len(loaders) != 1:
        raise ValueError(f"train_dataset: expected one training loader or train_dataset=, got {len(loaders)} loaders")
    source = _read(trainer, loaders[0], "train_dataset")
    if not isinstance(source, Samples):
        raise ValueError("train_dataset: the training samples have no indices; pass train_dataset= with a dataset")
    return source


def mover(trainer: pl.Trainer) -> Any:
    """Return a function that brings a batch to the module's device through the user's own transfer hooks."""

    def move(batch: Any) -> Any:
        with validating(trainer):
            return trainer.strategy.batch_to_device(batch)

    return move


@contextmanager
def explained_weights(trainer: pl.Trainer, module: nn.Module, which: Literal["last", "best"]) -> Iterator[None]:
    """Load the weights that the checkpoint callback found best, within the context, or keep the last ones."""
    path = getattr(trainer.checkpoint_callback, "best_model_path", "") if which == "best" else ""
    if which == "best" and not path:
        rank_zero_warn('weights="best": no checkpoint callback has a best model, so the last one is explained')
    with loaded(module, path) if path else nullcontext():
        yield


def in_precision(trainer: pl.Trainer, task: Task) -> Task:
    """Return the task calling the model in the trainer's precision; half-precision outputs become float32."""
    plugin = trainer.precision_plugin

    def outputs(module: nn.Module, inputs: Any) -> Tensor:
        with plugin.forward_context():
            return at_least_float32(task.outputs(module, plugin.convert_input(inputs)))

    return dataclasses.replace(task, outputs=outputs)


def settled_task(trainer: pl.Trainer, module: nn.Module, task: Task, samples: Samples | Iterable[Any]) -> Task:
    """Return the task in the trainer's precision, its kind decided from many targets."""
    task = in_precision(trainer, task)
    first = next(iter(dataclasses.replace(samples, workers=0).spread(2) if isinstance(samples, Samples) else samples))
    larger_batches = samples.spread(SAMPLES_TO_SETTLE) if isinstance(samples, Samples) else [first]
    return settle_kind(task, module, slice_samples(first, 0, 2), larger_batches)


def _validation_loaders(trainer: pl.Trainer) -> list[Any]:
    """Return the validation loaders; made from the user's hook where the trainer makes them only later."""
    loaders = _flat(trainer.val_dataloaders)
    if loaders or not trainer.enable_validation:
        return loaders
    # The trainer makes its loaders only at the first validation, from this source.
    source = getattr(trainer.fit_loop.epoch_loop.val_loop, "_data_source", None)
    return _flat(source.dataloader()) if source is not None and source.is_defined() else []


def _flat(loaders: Any) -> list[Any]:
    return [] if loaders is None else list(CombinedLoader(loaders).flattened)


def _read(trainer: pl.Trainer, loader: Any, argument: str) -> Samples | Iterable[Any]:
    """Return a loader's dataset in order; where it has no indices, its batches from a fresh start."""
    if not isinstance(loader, DataLoader):
        # An iterator returns itself: reading it here would take its batches from training.
        if iter(loader) is loader:
            raise ValueError(f"{argument}: expected a loader that can be read twice; pass a dataset")
        return _Moved(loader, mover(trainer))
    if _indexed(loader):
        return Samples.of(loader, move=mover(trainer))
    stream: Any = loader.dataset
    if isinstance(stream, IterableDataset) and iter(stream) is stream:
        raise ValueError(f"{argument}: expected a dataset that starts anew at each iteration; pass one with indices")
    # Without workers, and with a generator of its own, so that none of the run's is drawn from.
    fresh: DataLoader[Any] = DataLoader(
        loader.dataset, loader.batch_size, collate_fn=loader.collate_fn, generator=torch.Generator()
    )
    return _Moved(fresh, mover(trainer))


def _indexed(loader: DataLoader[Any]) -> bool:
    """Say whether a loader's samples have indices: no stream, and no dataset that hands out whole batches."""
    whole_batches = loader.batch_size is None and loader.batch_sampler is None
    return not isinstance(loader.dataset, IterableDataset) and not whole_batches and hasattr(loader.dataset, "__len__")


@dataclasses.dataclass(frozen=True)
class _Moved:
    """Batches of an iterable, each brought to the device."""

    batches: Iterable[Any]
    move: Any

    def __iter__(self) -> Iterator[Any]:
        with preserve_dataset_rng(getattr(self.batches, "dataset", self.batches)):
            for batch in self.batches:
                yield self.move(batch)


def progress_of(trainer: pl.Trainer) -> Progress:
    """Return a progress bar where the trainer has one, else silence."""
    progress_bar = trainer.progress_bar_callback
    return bar if progress_bar is not None and getattr(progress_bar, "is_enabled", True) else quiet
