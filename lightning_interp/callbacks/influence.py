"""Which training samples helped or hurt the predictions on a few validation samples, after training."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors.torch import save

from lightning_interp import report
from lightning_interp.batch import row, size, tensors
from lightning_interp.board import Board, clean
from lightning_interp.callbacks.access import (
    given_samples,
    indexed_training_set,
    mover,
    settled_task,
    validation_source,
)
from lightning_interp.callbacks.agreement import disagreement
from lightning_interp.callbacks.budget import Estimator, afford
from lightning_interp.callbacks.shell import OnError, Shell, begun, progress_of, run_folder
from lightning_interp.callbacks.showing import as_the_data_says, write_section
from lightning_interp.callbacks.telling import Told, strangeness, tell
from lightning_interp.display import Display
from lightning_interp.errors import ArgumentError
from lightning_interp.figures import png
from lightning_interp.influence import InfluenceFunction
from lightning_interp.probe import take_probe
from lightning_interp.records import Influence
from lightning_interp.samples import Samples
from lightning_interp.storage import Folder
from lightning_interp.task import Task

SHORTEST_BUDGET = 60.0
LONGEST_ON_ONE_RANK = 300.0
MOST_SEARCHED = 4096
MOST_OF_A_STREAM = 256


@dataclass(frozen=True)
class _Run:
    """What one fit goes by: its folder, its samples, how they are read and how they are shown."""

    folder: Folder
    train: Samples
    query: Samples
    task: Task
    display: Display
    notes: tuple[str, ...]


class DataInfluence(Callback):
    """Find, after training, the most helpful and the most harmful training samples for a few predictions.

    The queries are validation samples, the most confidently wrong first. Scores are those of influence functions:
    positive is helpful (see `lightning_interp.influence.InfluenceFunction`). Written to
    `<log_dir>/interp/influence`: `report.html`, `influence.csv` (the 100 best of each list and query),
    `scores.safetensors` (all scores), and the pictures.

    Logged, with `Q` a query's id, after training, at `trainer.global_step`:
        `influence/query_Q`: image: the query beside its most helpful, most harmful and surprisingly helpful samples
            (the most helpful of another class).
        `influence_notes/summary`: text: what the scores are, from how many samples, and how far to trust them.
        `interp_seconds/DataInfluence`: scalar: seconds that this callback took.
        `interp_errors/DataInfluence`: text, only where it failed and switched itself off.

    Args:
        queries: how many validation samples to explain.
        top: how many training samples to show of each kind.
        estimator: `InfluenceFunction()`, or any callable (model, train, query, task=, candidates=, progress=) →
            `Influence`.
        train_dataset: the training set without augmentation, in the order of its indices; when None, the training
            loader's dataset.
        query_dataset: where queries are looked for; when None, the validation set.
        budget_seconds: about how long it may take at most; when None, as long as one training epoch, or 60 if that is
            longer (with several ranks, which wait for it, never over 300). What does not fit is scored on an evenly
            spread subset, said aloud.
        task: how to read a batch, call the model, and its loss.
        display: how samples are shown.
        on_error: "warn" switches the callback off on its first failure; "raise" raises.

    Raises:
        ValueError, TypeError: an argument is off; always before the first batch.
    """

    def __init__(
        self,
        queries: int = 6,
        top: int = 5,
        estimator: Estimator = InfluenceFunction(),
        train_dataset: Any = None,
        query_dataset: Any = None,
        budget_seconds: float | None = None,
        task: Task = Task(),
        display: Display = Display(),
        on_error: OnError = "warn",
    ) -> None:
        _check_arguments(queries, top, estimator, budget_seconds)
        self.queries = queries
        self.top = top
        self.estimator = estimator
        self.train_dataset = train_dataset
        self.query_dataset = query_dataset
        self.budget_seconds = budget_seconds
        self.task = task
        self.display = display
        chosen = train_dataset is not None or query_dataset is not None or task != Task()
        self._shell = Shell("DataInfluence", on_error, chosen or estimator != InfluenceFunction())
        self._run: _Run | None = None
        self._epoch_started = 0.0
        self._epoch_seconds: list[float] = []

    @property
    def state_key(self) -> str:
        """Key of the callback in a checkpoint; two instances with other arguments get other keys."""
        return self._generate_state_key(queries=self.queries, top=self.top, estimator=repr(self.estimator))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the training set, and check that its samples can be scored."""
        folder = run_folder(trainer)
        self._shell.start(partial(self._start, folder), trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the time."""
        self._epoch_started = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note how long the epoch took: the budget goes by it."""
        self._epoch_seconds.append(time.perf_counter() - self._epoch_started)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the training samples, while the model is still on its device."""
        self._shell.run(self._end, trainer, pl_module)

    def _start(self, folder: Folder, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._run, self._epoch_seconds, self._epoch_started = None, [], time.perf_counter()
        if self.train_dataset is not None:
            train = given_samples(trainer, self.train_dataset)
        else:
            try:
                train = indexed_training_set(trainer)
            except ValueError as error:
                self._shell.switch_off(str(error))
                return
        query = self._query_set(trainer)
        for name, samples in (("train_dataset", train), ("query_dataset", query)):
            if not len(samples):
                raise ArgumentError(f"DataInfluence({name}=...): expected at least one sample, got none")
        few = dataclasses.replace(train, workers=0).at(range(min(4, len(train))))
        first, again = next(iter(few)), next(iter(few))
        task = settled_task(trainer, module, self.task, train)
        notes = [_augmented(task, first, again)]
        if trainer.world_size == 1:  # on one rank alone a training step with a collective would wait for ever
            notes.append(disagreement(module, task, first))
        if check := getattr(self.estimator, "check", None):
            check(module, train, task=task)
        for note in filter(None, notes):
            rank_zero_warn(f"DataInfluence: {note}")
        display = as_the_data_says(self.display, train)
        self._run = _Run(folder, train, query, task, display, tuple(filter(None, notes)))

    def _query_set(self, trainer: pl.Trainer) -> Samples:
        """Return the samples to choose queries from; of a stream, the first ones."""
        if self.query_dataset is not None:
            return given_samples(trainer, self.query_dataset)
        found = validation_source(trainer, self._shell.owner).samples
        if isinstance(found, Samples):
            return found
        batches = take_probe(found, MOST_OF_A_STREAM, "validation set", self.task).batches
        rows = [row(batch, place) for batch in batches for place in range(size(batch))]
        return Samples(rows, batch_size=size(batches[0]), move=mover(trainer))

    def _end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        run = begun(self._run)
        task = run.task
        query = self._choose_queries(trainer, module, task)
        plan = afford(self.estimator, module, run.train, query, task, self._budget(trainer))
        if plan.message:
            rank_zero_warn(f"DataInfluence: {plan.message} Pass budget_seconds= for more.")
        candidates = plan.candidates or range(len(run.train))
        found = plan.estimator(
            module, run.train, query, task=task, candidates=candidates, progress=progress_of(trainer)
        )
        found = dataclasses.replace(found, notes=found.notes + run.notes)
        told = tell(module, task, found, run.train.at(candidates), query, self.top, run.display)
        self._publish(trainer, run.folder, found, told)

    def _budget(self, trainer: pl.Trainer) -> float:
        if self.budget_seconds is not None:
            return self.budget_seconds
        epoch = sum(self._epoch_seconds) / max(1, len(self._epoch_seconds))
        return min(max(SHORTEST_BUDGET, epoch), math.inf if trainer.world_size == 1 else LONGEST_ON_ONE_RANK)

    def _choose_queries(self, trainer: pl.Trainer, module: pl.LightningModule, task: Task) -> Samples:
        """Return the validation samples that are most confidently wrong, then those of the highest loss."""
        samples = begun(self._run).query.spread(MOST_SEARCHED)
        batches = -(-len(samples) // samples.batch_size)
        with torch.no_grad():
            ranks = [
                strangeness(task, *task.losses(module, batch)).cpu()
                for batch in progress_of(trainer)(samples, batches, "choosing queries")
            ]
        order = torch.cat(ranks).argsort(descending=True, stable=True)
        return samples.at(order[: self.queries].tolist())

    def _publish(self, trainer: pl.Trainer, folder: Folder, found: Influence, told: Told) -> None:
        board, step = Board(trainer.loggers), trainer.global_step
        for name, pixels in told.galleries.items():
            board.image(f"influence/query_{name}", pixels, step)
            folder.write(f"influence/query-{clean(name).replace('/', '_')}.png", png(pixels))
        board.text("influence_notes/summary", told.summary, step)
        section = report.influence_section(found, told.cards)
        folder.write("influence/report.html", report.page("Training-data influence", [section]))
        folder.write("influence/influence.csv", report.influence_csv(told.rows))
        scores = {"scores": found.scores.float().contiguous(), "train_index": found.train_ids}
        folder.write("influence/scores.safetensors", save(scores))
        write_section(folder, "influence", section)
        rank_zero_info(f"DataInfluence: the report is in {folder.file('influence/report.html')}")


def _augmented(task: Task, first: Any, again: Any) -> str:
    """Say so, if a dataset gave other inputs the second time it was read."""
    pairs = zip(tensors(task.inputs(first)), tensors(task.inputs(again)), strict=True)
    if all(a.shape == b.shape and bool(((a == b) | (a != a)).all()) for a, b in pairs):
        return ""
    return (
        "the training set returns other inputs each time it is read (augmentation?), so scores are those of one draw;"
        " pass train_dataset= without it"
    )


def _check_arguments(queries: Any, top: Any, estimator: Any, budget_seconds: Any) -> None:
    owner = "DataInfluence"
    for name, value in (("queries", queries), ("top", top)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{owner}({name}=...): expected a whole number from 1, got {value!r}")
    if isinstance(estimator, type) or not callable(estimator):
        raise TypeError(f"{owner}(estimator=...): expected an estimator such as InfluenceFunction(), got {estimator!r}")
    if budget_seconds is not None and not (isinstance(budget_seconds, (int, float)) and budget_seconds > 0):
        raise ValueError(f"{owner}(budget_seconds=...): expected seconds above 0 or None, got {budget_seconds!r}")
