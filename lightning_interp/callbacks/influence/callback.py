"""Which training samples helped or hurt the predictions on a few validation samples, after training."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_interp.callbacks.guard import Guard, OnError, started_run
from lightning_interp.callbacks.influence.arguments import changed_arguments, check_arguments
from lightning_interp.callbacks.influence.checkpoint import named_class, read_checkpoint, restored_data, restored_module
from lightning_interp.callbacks.influence.preflight import (
    augmentation_warning,
    averaging_warning,
    loss_disagreement,
    unrecorded_steps_warning,
)
from lightning_interp.callbacks.influence.queries import choose_queries, query_candidates
from lightning_interp.callbacks.influence.recorder import Recorder
from lightning_interp.callbacks.influence.replay import replay_end, run_folder_of
from lightning_interp.callbacks.influence.report import describe_influence, influence_findings
from lightning_interp.callbacks.influence.scoring import AnyEstimator, InfluenceQuestion, score_within_budget
from lightning_interp.callbacks.influence.spot_checks import (
    LAST_LAYER,
    RetrainMethod,
    check_last_layer,
    checked_by_retraining,
)
from lightning_interp.callbacks.publish import publish, run_folder
from lightning_interp.callbacks.trainer_data import (
    explained_weights,
    given_samples,
    indexed_training_set,
    progress_of,
    settled_task,
)
from lightning_interp.checks import ArgumentError
from lightning_interp.data.samples import Samples
from lightning_interp.data.task import Task
from lightning_interp.influence import InfluenceFunction, Trajectory
from lightning_interp.influence.gradients.distributed import Distributed, OtherRankError, Ranks, SingleProcess
from lightning_interp.influence.results import Influence, SpotCheck
from lightning_interp.storage.folder import Folder
from lightning_interp.views.describe import with_dataset_names
from lightning_interp.views.display import Display

INFLUENCE = "DataInfluence"
SHORTEST_BUDGET = 60.0  # seconds: a wait that is acceptable after epochs of one second, too
LONGEST_ON_SEVERAL_RANKS = 300.0  # seconds: well below the ten minutes after which NCCL gives a waiting rank up
FOR_MORE = "Pass budget_seconds= for more, or run `lightning-interp influence CHECKPOINT` later."
NO_TRAJECTORY = (
    "the checkpoint does not hold the learning rates that led to it, since it was written without DataInfluence;"
    " damping, unless given, is the estimator's own"
)


@dataclass(frozen=True)
class InfluenceRun:
    """The state of one fit.

    Args:
        folder: the run's.
        train: the training samples.
        query: the samples among which queries are chosen.
        task: how they are read.
        display: how they are shown.
        cautions: reasons to distrust the scores that are known before they are computed.
    """

    folder: Folder
    train: Samples
    query: Samples
    task: Task
    display: Display
    cautions: tuple[str, ...]


class DataInfluence(Callback):
    """Find, after training, the most helpful and the most harmful training samples for a few predictions.

    The queries are validation samples, the most confidently wrong first. Scores are those of influence functions:
    positive is helpful (see `lightning_interp.influence.InfluenceFunction`). Damping follows from the learning rates,
    weight decay and second moments of the run itself, which are recorded at each optimizer step. With several ranks
    each scores its share. Written to `<log_dir>/interp/influence`: `report.html`, `influence.csv` (the 100 best of each
    list and query), `self_influence.csv`, `scores.safetensors` (of the samples in any list where all would be over
    64 MB), and the pictures.

    A second callback of this class in a trainer needs other arguments than the first; it has the folder `influence-2`,
    and its tags begin with it.

    Logged, with `Q` a query's id, after training, at `trainer.global_step`:
        `influence/query_Q`: image: the query beside its most helpful, most harmful and surprisingly helpful samples
            (the most helpful of another class).
        `influence/look_at_first`: image: the training samples with the largest self-influence, mislabelled ones among
            them, with the labels that the network suggests.
        `influence/spot_check`: image, only with `retrain`: predicted against actual changes of loss.
        `influence_notes/summary`: text: what the scores are, from how many samples, and how far to trust them.
        `interp_seconds/DataInfluence`: scalar: seconds that this callback took.
        `interp_errors/DataInfluence`: text, only where it failed and switched itself off.

    Args:
        queries: how many validation samples to explain.
        top: how many training samples to show of each kind.
        estimator: an `InfluenceFunction`, which takes the recorded damping if it has none of its own, or any callable
            (model, train, query, task=, candidates=, progress=) → `Influence`; when None, an `InfluenceFunction` whose
            curvature depends on the network's size.
        train_dataset: the training set without augmentation, in the order of its indices; when None, the training
            loader's dataset.
        query_dataset: the samples among which queries are chosen; when None, the validation set.
        weights: which network is explained: the last one, or the best by the trainer's checkpoint callback (put back
            afterwards; where there is none the last one, with a warning).
        self_influence: whether to rank the training samples by their influence on themselves.
        retrain: for a spot check of the most helpful and the most harmful sample of each query: "last_layer" retrains
            that alone without each of them (see `lightning_interp.influence.LastLayer`), in seconds, which can confirm
            scores but not refute them; a function (dataset indices to train on) → a network trained on them is called
            for each, and once for all samples.
        budget_seconds: about how long it may take at most; when None, as long as one training epoch, or 60 if that is
            longer (with several ranks never over 300). Where all samples do not fit, an evenly spread subset is scored,
            with a warning. `retrain` may take as long again; on one rank a function has all the time that it takes.
        task: how to read a batch, call the model, and its loss.
        display: how samples are shown.
        on_error: "warn" switches the callback off on its first failure; "raise" raises.

    Raises:
        ValueError, TypeError: an argument is invalid; always before the first batch.
    """

    def __init__(
        self,
        queries: int = 6,
        top: int = 5,
        estimator: AnyEstimator | None = None,
        train_dataset: Any = None,
        query_dataset: Any = None,
        weights: Literal["last", "best"] = "last",
        self_influence: bool = True,
        retrain: RetrainMethod | None = None,
        budget_seconds: float | None = None,
        task: Task = Task(),
        display: Display = Display(),
        on_error: OnError = "warn",
    ) -> None:
        check_arguments(queries, top, estimator, budget_seconds, retrain, weights)
        self.queries = queries
        self.top = top
        self.estimator = estimator
        self.train_dataset = train_dataset
        self.query_dataset = query_dataset
        self.weights = weights
        self.self_influence = self_influence
        self.retrain = retrain
        self.budget_seconds = budget_seconds
        self.task = task
        self.display = display
        data_given = train_dataset is not None or query_dataset is not None or task != Task()
        arguments_given = data_given or estimator is not None or retrain is not None
        self._guard = Guard(INFLUENCE, "influence", on_error, arguments_given, on_every_rank=True)
        self._run: InfluenceRun | None = None
        self._recorder = Recorder()
        self._epoch_started = 0.0
        self._epoch_seconds: list[float] = []
        self._query_ids: Sequence[int] | None = None

    @property
    def state_key(self) -> str:
        """Key of the callback in a checkpoint; two instances with other arguments get other keys."""
        changed = changed_arguments(self.train_dataset, self.query_dataset, self.weights, self.retrain)
        return self._generate_state_key(queries=self.queries, top=self.top, estimator=repr(self.estimator), **changed)

    def state_dict(self) -> dict[str, Any]:
        """Return how far training went, for a run that is resumed."""
        return self._recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore how far training went."""
        self._recorder.load_state_dict(state_dict)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add which parameters are trained: what froze the others during training is not there later."""
        if (state := checkpoint.get("callbacks", {}).get(self.state_key)) is not None:
            state["trained"] = [name for name, p in pl_module.named_parameters() if p.requires_grad]

    def explain(
        self,
        checkpoint: str | os.PathLike[str],
        module: Any,
        data: Any = None,
        query: Sequence[int] | None = None,
        out: str | os.PathLike[str] | None = None,
        device: str = "auto",
        precision: Any = "32-true",
        trusted: bool = False,
    ) -> str:
        """Do after training, from a checkpoint, what this callback does at its end, and write and log it as there.

        The scores are those of the callback itself where it was there in training: the checkpoint then holds what the
        damping is computed from. Otherwise the damping, unless given, is the estimator's own. Without `budget_seconds`
        all is scored.

        Args:
            checkpoint: a Lightning checkpoint.
            module: the network's class, made with the hyperparameters in the checkpoint; an instance, or a function
                that returns one.
            data: a LightningDataModule, its class, a pair (training, validation) of loaders or datasets, or a function
                that returns one of these; None where the network has loaders of its own.
            query: which validation samples to explain, by index; as many as `queries`, chosen, when None.
            out: a run's folder, whose `interp/influence` is replaced; that which the checkpoint lies in when None.
            device: "auto", "cpu", "cuda", "cuda:1", "mps", ...
            precision: as in training, for a `Trainer`.
            trusted: whether to unpickle arbitrary objects in the checkpoint, which may run code.

        Returns:
            The report's path.

        Raises:
            FileNotFoundError, ValueError, TypeError: an argument is invalid, or the data has no indices.
        """
        contents = read_checkpoint(checkpoint, trusted)
        if module is None:
            hint = f"; the checkpoint names {named_class(contents)}" if named_class(contents) else ""
            raise ValueError(f"module: expected the network's class, got none{hint}")
        network = restored_module(module, checkpoint, contents, trusted)
        callback, folder = self._after(contents, query), run_folder_of(checkpoint) if out is None else os.fspath(out)
        fit_data = restored_data(data, network, checkpoint, contents, trusted)
        trained = _recorded(contents).get("trained")
        replay_end(callback, network, fit_data, checkpoint, contents, folder, device, precision, trusted, trained)
        if not callback._guard.on:
            raise ValueError(f"data: {callback._guard.why_off.removeprefix('train_dataset: ')}")
        return started_run(callback._run).folder.folder(callback._guard.room).file("report.html")

    def _after(self, contents: Mapping[str, Any], query: Sequence[int] | None) -> DataInfluence:
        """Return a callback with these arguments, in the state in which the checkpoint's training left it."""
        # A copy, so that this callback can explain further checkpoints.
        callback = copy.copy(self)
        # Errors are raised: there is no training that must continue in spite of them.
        callback._guard = Guard(INFLUENCE, "influence", "raise", arguments_given=True, on_every_rank=True)
        callback._run, callback._recorder, callback._query_ids = None, Recorder(), query
        callback.budget_seconds = math.inf if self.budget_seconds is None else self.budget_seconds
        if recorded := _recorded(contents):
            callback.load_state_dict(dict(recorded))
        else:
            rank_zero_warn(f"{INFLUENCE}: {NO_TRAJECTORY}")
        return callback

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the training set, and check that its samples can be scored."""
        self._guard.start(partial(self._start, run_folder(trainer)), trainer, pl_module, self)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the time."""
        self._epoch_started = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the learning rates: damping follows from their sum."""
        self._recorder.step(trainer, pl_module, optimizer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note how long the epoch took: the default budget is one epoch."""
        self._epoch_seconds.append(time.perf_counter() - self._epoch_started)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the training samples, while the model is still on its device."""
        self._guard.run(self._end, trainer, pl_module)

    def _start(self, folder: Folder, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._run, self._epoch_seconds, self._epoch_started = None, [], time.perf_counter()
        train = self._training_set(trainer)
        if train is None:
            return
        query = query_candidates(trainer, self.query_dataset, self.task, INFLUENCE, self._query_ids)
        for name, samples in (("train_dataset", train), ("query_dataset", query)):
            if not len(samples):
                raise ArgumentError(f"{INFLUENCE}({name}=...): expected at least one sample, got none")
        task = settled_task(trainer, module, self.task, train)
        cautions = self._preflight(trainer, module, train, task)
        for caution in cautions:
            rank_zero_warn(f"{INFLUENCE}: {caution}")
        display = with_dataset_names(self.display, train)
        self._run = InfluenceRun(folder, train, query, task, display, cautions)

    def _training_set(self, trainer: pl.Trainer) -> Samples | None:
        """Return the training samples; None, with the callback switched off, where they have no indices."""
        if self.train_dataset is not None:
            return given_samples(trainer, self.train_dataset)
        try:
            return indexed_training_set(trainer)
        except ValueError as error:
            self._guard.switch_off(str(error))
            return None

    def _preflight(
        self, trainer: pl.Trainer, module: pl.LightningModule, train: Samples, task: Task
    ) -> tuple[str, ...]:
        """Return reasons to distrust the scores; raise where they cannot be computed at all."""
        first_samples = dataclasses.replace(train, workers=0).at(range(min(4, len(train))))
        # Read twice: a dataset that augments gives other inputs the second time.
        batch, batch_again = next(iter(first_samples)), next(iter(first_samples))
        cautions = [
            augmentation_warning(task, batch, batch_again),
            averaging_warning(trainer, self),
            unrecorded_steps_warning(trainer, self._recorder.steps),
        ]
        if trainer.world_size == 1:  # on one rank alone a training step with a collective would wait for ever
            cautions.append(loss_disagreement(module, task, batch))
        if check := getattr(self._estimator_with(None), "check", None):
            check(module, train, task=task)
        if self.retrain == LAST_LAYER:
            check_last_layer(INFLUENCE, module, task, batch)
        return tuple(filter(None, cautions))

    def _estimator_with(self, trajectory: Trajectory | None) -> AnyEstimator:
        """Return the estimator, which uses the recorded trajectory where it has no damping of its own."""
        estimator = InfluenceFunction() if self.estimator is None else self.estimator
        if isinstance(estimator, InfluenceFunction) and estimator.damping is None:
            return dataclasses.replace(estimator, damping=trajectory)
        return estimator

    def _end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        ranks = Distributed() if trainer.world_size > 1 else SingleProcess()
        try:
            with explained_weights(trainer, module, self.weights):
                self._score(trainer, module, ranks)
            ranks.gather(None)  # the others wait, so that rank zero can report to them if it could not publish
        except OtherRankError:
            raise
        except Exception as error:
            ranks.report_failure(f"{type(error).__name__}: {error}")
            raise

    def _score(self, trainer: pl.Trainer, module: pl.LightningModule, ranks: Ranks) -> None:
        run = started_run(self._run)
        trajectory = self._recorder.finish(trainer, module)
        count = self.queries if self._query_ids is None else len(run.query)
        query = choose_queries(trainer, module, run.task, run.query, count)
        seconds = self._budget(trainer)
        question = InfluenceQuestion(module, run.train, query, run.task, progress_of(trainer), ranks)
        answer = score_within_budget(question, self._estimator_with(trajectory), self.self_influence, seconds)
        if answer is None or not trainer.is_global_zero:
            return
        if answer.message:
            rank_zero_warn(f"{INFLUENCE}: {answer.message} {FOR_MORE}")
        checks = self._spot_checks(question, answer.influence, trajectory, seconds)
        notes = (*answer.influence.notes, *([trajectory.why_not] if trajectory.why_not else []))
        influence = dataclasses.replace(answer.influence, notes=notes, doubts=run.cautions)
        samples = (module, run.task, influence, run.train, query, self.top, run.display)
        report = describe_influence(*samples, answer.suspects, influence.duplicates, checks)
        room, loggers = self._guard.room, self._guard.loggers(trainer)
        publish(influence_findings(report, trainer.global_step), loggers, run.folder, room)
        rank_zero_info(f"{INFLUENCE}: the report is in {run.folder.folder(room).file('report.html')}")

    def _spot_checks(
        self, question: InfluenceQuestion, influence: Influence, trajectory: Trajectory, seconds: float
    ) -> tuple[SpotCheck, ...]:
        """Check the scores by retraining, if `retrain` is given; where that fails, they are reported unchecked."""
        if self.retrain is None:
            return ()
        estimator = self._estimator_with(trajectory)
        damping = estimator.damping if isinstance(estimator, InfluenceFunction) else trajectory
        try:
            without_limit = question.ranks.count == 1 and self.retrain != LAST_LAYER
            limit = math.inf if without_limit else seconds
            return checked_by_retraining(question, influence, self.retrain, damping, limit)
        except Exception:
            if self._guard.on_error == "raise":
                raise
            rank_zero_warn(f"{INFLUENCE}(retrain=...) failed, so the scores stand unchecked:\n{traceback.format_exc()}")
            return ()

    def _budget(self, trainer: pl.Trainer) -> float:
        if self.budget_seconds is not None:
            return self.budget_seconds
        epoch = sum(self._epoch_seconds) / max(1, len(self._epoch_seconds))
        return min(max(SHORTEST_BUDGET, epoch), math.inf if trainer.world_size == 1 else LONGEST_ON_SEVERAL_RANKS)


def _recorded(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what this callback wrote into a checkpoint, with any arguments; empty if it was not there."""
    states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, Mapping)]
    return next((state for state in states if {"steps", "rate_sums"} <= set(state)), {})
