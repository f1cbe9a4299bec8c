"""What the three callbacks share: when to work, what happens on an error, where to write, what it cost."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Literal, TypeVar, cast
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch.distributed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_interp.callbacks.loggers import Loggers
from lightning_interp.checks import ArgumentError
from lightning_interp.network.undisturbed import undisturbed
from lightning_interp.progress import Progress, bar, quiet
from lightning_interp.storage.folder import Folder

T = TypeVar("T")
OnError = Literal["warn", "raise"]
Work = Callable[[pl.Trainer, pl.LightningModule], None]
_STARTED: WeakKeyDictionary[pl.Trainer, str] = WeakKeyDictionary()
FOLDER_PER_RUN = ("TensorBoardLogger", "CSVLogger")
SHARDED = ("FSDP", "DeepSpeed", "ModelParallel")


class Guard:
    """Runs a callback's work so that it cannot harm the training run.

    All of it happens inside `undisturbed`: the module is in eval mode, and whatever the work, the user's own functions
    or a library draws or changes is put back.
    Before the first batch, an error is raised where the user gave the arguments that it may come from; where only
    defaults were tried, or later with `on_error="warn"`, it is warned about, the callback is switched off, and
    training goes on.

    Args:
        owner: name of the callback.
        on_error: "warn" or "raise".
        chosen: whether the user gave any argument that says what to look at.
        everywhere: whether the work is shared by all ranks; else rank zero does it alone.
    """

    def __init__(self, owner: str, on_error: OnError, chosen: bool, everywhere: bool = False) -> None:
        if on_error not in ("warn", "raise"):
            raise ValueError(f'{owner}(on_error=...): expected "warn" or "raise", got {on_error!r}')
        self.owner = owner
        self.on_error = on_error
        self.chosen = chosen
        self.everywhere = everywhere
        self.on = True
        self.why_off = ""
        self._seconds = 0.0

    def start(self, work: Work, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Do work before the first batch; raise what the user can put right in the arguments."""
        self.on, self._seconds = True, 0.0
        if any(kind in type(trainer.strategy).__name__ for kind in SHARDED):
            self.switch_off(f"{type(trainer.strategy).__name__} shards the parameters, which is not supported")
        failed: Exception | None = None
        if self._works(trainer):
            try:
                with self._timed(), undisturbed(module):
                    work(trainer, module)
            except Exception as error:
                if self.chosen or self.on_error == "raise" or isinstance(error, ArgumentError):
                    error.add_note(f"Raised by {self.owner} before the first batch.")
                    failed = error
                else:
                    told = f"{type(error).__name__}: {error}"
                    self.switch_off(
                        f"by its defaults it cannot look at this model and data ({told}); pass task= or a dataset"
                    )
        self._raise_everywhere(trainer, failed)
        everyone = self._everyone(trainer, self.on)
        if self.on and not all(everyone):
            self.switch_off("it is off on another rank")

    def run(self, work: Work, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Do work while training runs, or right after it; log the seconds it took since the last time."""
        failed: Exception | None = None
        if self._works(trainer):
            try:
                with self._timed(), undisturbed(module):
                    work(trainer, module)
                if trainer.is_global_zero:
                    self._log_cost(trainer)
            except Exception as error:
                failed = error
                if self.on_error == "warn":
                    self._give_up(trainer, error)
        if self.on_error == "raise":
            self._raise_everywhere(trainer, failed)

    def _raise_everywhere(self, trainer: pl.Trainer, failed: Exception | None) -> None:
        """Raise on all ranks what one met (rank zero, where it works alone), so that none waits for another."""
        mine = "" if failed is None else str(failed) or type(failed).__name__
        if self.everywhere:
            told = {rank: why for rank, why in enumerate(self._everyone(trainer, mine)) if why}
        else:
            why = trainer.strategy.broadcast(mine) if trainer.world_size > 1 else ""
            told = {0: why} if why else {}
        if failed is not None:
            raise failed
        for rank, why in told.items():
            raise RuntimeError(f"{self.owner} failed on rank {rank or 'zero'}: {why}")

    def _everyone(self, trainer: pl.Trainer, value: T) -> list[T]:
        """Return what each rank says, where the work is shared; else this rank's own word."""
        if not self.everywhere or trainer.world_size == 1:
            return [value]
        held: list[T | None] = [None] * trainer.world_size
        torch.distributed.all_gather_object(held, value)
        return cast(list[T], held)

    def switch_off(self, why: str) -> None:
        """Stay off for the rest of this run, and say why."""
        self.on, self.why_off = False, why
        rank_zero_warn(f"{self.owner} is off for this run: {why}")

    def _works(self, trainer: pl.Trainer) -> bool:
        return self.on and (self.everywhere or trainer.is_global_zero)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started

    def _log_cost(self, trainer: pl.Trainer) -> None:
        Loggers(trainer.loggers).scalars({f"interp_seconds/{self.owner}": self._seconds}, trainer.global_step)
        self._seconds = 0.0

    def _give_up(self, trainer: pl.Trainer, error: Exception) -> None:
        told = "".join(traceback.format_exception(error))
        self.switch_off(f"it failed, and training goes on without it.\n{told}")
        with suppress(Exception):
            Loggers(trainer.loggers).text(f"interp_errors/{self.owner}", f"```\n{told}\n```", trainer.global_step)


def started_run(run: T | None) -> T:
    """Return what `on_train_start` left behind.

    Raises:
        RuntimeError: it was not called.
    """
    if run is None:
        raise RuntimeError("training goes on without on_train_start having been called")
    return run


def run_folder(trainer: pl.Trainer) -> Folder:
    """Return the run's folder, `<trainer.log_dir>/interp`; call it on all ranks.

    A log folder that several runs share (no logger, or one without a folder per run) gets the time of the start as
    a name for the run. With `fast_dev_run` it is in memory, and nothing is written to disk.
    """
    root = trainer.log_dir or trainer.default_root_dir
    started = _STARTED.setdefault(trainer, datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f"))
    if getattr(trainer, "fast_dev_run", False):
        return Folder(f"memory://lightning_interp/{started}")
    folder = Folder(str(root)).folder("interp")
    own = trainer.loggers and any(kind.__name__ in FOLDER_PER_RUN for kind in type(trainer.loggers[0]).__mro__)
    return folder if own else folder.folder(_run_name(trainer) or started)


def room_of(callback: Callback, trainer: pl.Trainer, name: str) -> str:
    """Return the folder of a callback in the run's: a second one of its kind gets a number, `name-2`."""
    same = [other for other in getattr(trainer, "callbacks", []) if type(other) is type(callback)]
    place = next((i for i, other in enumerate(same) if other is callback), 0)
    return name if place == 0 else f"{name}-{place + 1}"


def progress_of(trainer: pl.Trainer) -> Progress:
    """Return a progress bar where the trainer has one, else silence."""
    shown = trainer.progress_bar_callback
    return bar if shown is not None and getattr(shown, "is_enabled", True) else quiet


def _run_name(trainer: pl.Trainer) -> str | None:
    version = trainer.loggers[0].version if trainer.loggers else None
    return None if version is None else str(version)
