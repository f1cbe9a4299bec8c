"""When a callback works, what happens on an error, and what its work cost."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal, TypeVar, cast

import lightning.pytorch as pl
import torch.distributed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_interp.callbacks.loggers import Loggers
from lightning_interp.callbacks.publish import room_of
from lightning_interp.checks import ArgumentError
from lightning_interp.network.undisturbed import undisturbed

T = TypeVar("T")
OnError = Literal["warn", "raise"]
Work = Callable[[pl.Trainer, pl.LightningModule], None]
SHARDED_STRATEGIES = ("FSDP", "DeepSpeed", "ModelParallel")


class Guard:
    """Runs a callback's work so that it cannot harm the training run.

    All work runs inside `undisturbed`: the module is in eval mode, and its state and that of the random generators are
    restored, even where the user's own functions or a library changed them. Before the first batch, an error is raised
    where the user gave the arguments that it may come from; where only defaults were tried, or later with
    `on_error="warn"`, a warning is given, the callback is switched off, and training continues.

    Args:
        owner: name of the callback.
        kind: its folder's name, and the first word of its tags.
        on_error: "warn" or "raise".
        arguments_given: whether the user gave any argument that says what to read.
        on_every_rank: whether the work is shared by all ranks; else rank zero does it alone.
    """

    def __init__(
        self, owner: str, kind: str, on_error: OnError, arguments_given: bool, on_every_rank: bool = False
    ) -> None:
        if on_error not in ("warn", "raise"):
            raise ValueError(f'{owner}(on_error=...): expected "warn" or "raise", got {on_error!r}')
        self.owner, self.kind, self.room = owner, kind, kind
        self.on_error = on_error
        self.arguments_given = arguments_given
        self.on_every_rank = on_every_rank
        self.on = True
        self.why_off = ""
        self._seconds = 0.0

    def start(self, work: Work, trainer: pl.Trainer, module: pl.LightningModule, callback: Callback) -> None:
        """Do work before the first batch; raise errors that the user can fix by other arguments."""
        self.on, self._seconds, self.room = True, 0.0, room_of(callback, trainer, self.kind)
        if any(name in type(trainer.strategy).__name__ for name in SHARDED_STRATEGIES):
            self.switch_off(f"{type(trainer.strategy).__name__} shards the parameters, which is not supported")
        failure: Exception | None = None
        if self._works(trainer):
            try:
                with self._timed(), undisturbed(module):
                    work(trainer, module)
            except Exception as error:
                if self.arguments_given or self.on_error == "raise" or isinstance(error, ArgumentError):
                    error.add_note(f"Raised by {self.owner} before the first batch.")
                    failure = error
                else:
                    reason = f"{type(error).__name__}: {error}"
                    self.switch_off(f"its defaults do not fit this model and data ({reason}); pass task= or a dataset")
        self._raise_on_all_ranks(trainer, failure)
        # Off on one rank is off on all: the others would wait for it in their collectives.
        if self.on and not all(self._from_all_ranks(trainer, self.on)):
            self.switch_off("it is off on another rank")

    def run(self, work: Work, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Do work while training runs, or right after it; log the seconds it took since the last time."""
        failure: Exception | None = None
        if self._works(trainer):
            try:
                with self._timed(), undisturbed(module):
                    work(trainer, module)
                if trainer.is_global_zero:
                    self._log_cost(trainer)
            except Exception as error:
                failure = error
                if self.on_error == "warn":
                    self._give_up(trainer, error)
        if self.on_error == "raise":
            self._raise_on_all_ranks(trainer, failure)

    def loggers(self, trainer: pl.Trainer) -> Loggers:
        """Return the trainer's loggers, under this callback's tags."""
        return Loggers(trainer.loggers, self.room)

    def log_error(self, trainer: pl.Trainer, message: str) -> None:
        """Log an error's traceback as text."""
        tag = f"interp_errors/{self._numbered_owner}"
        self.loggers(trainer).text(tag, f"```\n{message}\n```", trainer.global_step)

    def switch_off(self, why: str) -> None:
        """Stay off for the rest of this run, and warn."""
        self.on, self.why_off = False, why
        rank_zero_warn(f"{self.owner} is off for this run: {why}")

    @property
    def _numbered_owner(self) -> str:
        """The callback's name, with the number of its folder where it is not the first of its class."""
        return self.owner + self.room.removeprefix(self.kind)

    def _raise_on_all_ranks(self, trainer: pl.Trainer, failure: Exception | None) -> None:
        """Raise the error of one rank (rank zero, where it works alone) on all, so that none waits for another."""
        reason = "" if failure is None else str(failure) or type(failure).__name__
        if self.on_every_rank:
            reasons = {rank: why for rank, why in enumerate(self._from_all_ranks(trainer, reason)) if why}
        else:
            why = trainer.strategy.broadcast(reason) if trainer.world_size > 1 else ""
            reasons = {0: why} if why else {}
        if failure is not None:
            raise failure
        for rank, why in reasons.items():
            raise RuntimeError(f"{self.owner} failed on rank {rank or 'zero'}: {why}")

    def _from_all_ranks(self, trainer: pl.Trainer, value: T) -> list[T]:
        """Return each rank's value where the work is shared, else this rank's alone."""
        if not self.on_every_rank or trainer.world_size == 1:
            return [value]
        values: list[T | None] = [None] * trainer.world_size
        torch.distributed.all_gather_object(values, value)
        return cast(list[T], values)

    def _works(self, trainer: pl.Trainer) -> bool:
        return self.on and (self.on_every_rank or trainer.is_global_zero)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started

    def _log_cost(self, trainer: pl.Trainer) -> None:
        seconds = {f"interp_seconds/{self._numbered_owner}": self._seconds}
        self.loggers(trainer).scalars(seconds, trainer.global_step)
        self._seconds = 0.0

    def _give_up(self, trainer: pl.Trainer, error: Exception) -> None:
        message = "".join(traceback.format_exception(error))
        self.switch_off(f"it failed, and training goes on without it.\n{message}")
        with suppress(Exception):  # a logger that fails as well must not stop training either
            self.log_error(trainer, message)


def started_run(run: T | None) -> T:
    """Return what `on_train_start` left behind.

    Raises:
        RuntimeError: it was not called.
    """
    if run is None:
        raise RuntimeError("expected on_train_start to be called first")
    return run
