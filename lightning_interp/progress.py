"""Progress of long computations, reported through a callable, so that computations do not depend on how it is shown."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from tqdm import tqdm

T = TypeVar("T")


@runtime_checkable
class Progress(Protocol):
    """Passes an iterable through and shows how far it got."""

    def __call__(self, items: Iterable[T], total: int, what: str) -> Iterable[T]:
        """Return `items`, of which there are `total`, and show under the name `what` how many are done."""


def quiet(items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """Show nothing."""
    return items


def bar(items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """Show a bar on standard error that disappears at the end."""
    return tqdm(items, total=total, desc=what, leave=False, dynamic_ncols=True)


@dataclass(frozen=True)
class Within:
    """Ends work early: after `seconds` no further item is begun; the first always is.

    Args:
        seconds: counted from the start of the first item.
        progress: shows how far it got.
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
