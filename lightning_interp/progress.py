"""Progress of long work, as a callable, so that no room needs to know who watches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from tqdm import tqdm

T = TypeVar("T")


@runtime_checkable
class Progress(Protocol):
    """Hands an iterable on and shows how far it got."""

    def __call__(self, items: Iterable[T], total: int, what: str) -> Iterable[T]:
        """Return `items`, of which there are `total`, while telling the watcher `what` is done with them."""


def quiet(items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """Show nothing."""
    return items


def bar(items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """Show a bar on standard error that goes away when done."""
    return tqdm(items, total=total, desc=what, leave=False, dynamic_ncols=True)


@dataclass(frozen=True)
class Within:
    """Ends work early: after so many seconds nothing more is begun; the first item always is.

    Args:
        seconds: from the first item on.
        progress: who watches.
    """

    seconds: float
    progress: Progress = quiet

    def __call__(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """Yield `items` as long as there is time."""
        started: float | None = None
        for item in self.progress(items, total, what):
            if started is not None and time.perf_counter() - started > self.seconds:
                return
            started = time.perf_counter() if started is None else started
            yield item
