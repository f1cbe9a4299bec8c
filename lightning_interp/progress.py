"""Progress of long work, as a callable, so that no room needs to know who watches."""

from __future__ import annotations

from collections.abc import Iterable
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
