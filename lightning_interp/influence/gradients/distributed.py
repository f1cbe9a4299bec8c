"""Several processes that share the work: each takes its part of the samples, and hears what the others found."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist

from lightning_interp.data.samples import Samples


class OtherRankError(RuntimeError):
    """Another rank failed, and said so."""


@runtime_checkable
class Ranks(Protocol):
    """How many processes there are, and a way to tell each other."""

    index: int
    count: int

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank gave, in their order; all ranks call it."""

    def report_failure(self, why: str) -> None:
        """Tell the others, who wait in `gather`, that this rank will not come."""


class SingleProcess:
    """One process."""

    index, count = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """Return the value itself."""
        return [value]

    def report_failure(self, why: str) -> None:
        """Tell nobody."""


class Distributed:
    """The processes of `torch.distributed`'s default group."""

    def __init__(self) -> None:
        self.index, self.count = dist.get_rank(), dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank gave.

        Raises:
            OtherRankError: another rank came with bad news instead.
        """
        return self._exchanged((None, value))

    def report_failure(self, why: str) -> None:
        """Come to the others' next `gather` with the bad news."""
        try:
            self._exchanged((why, None))
        except OtherRankError:
            return

    def _exchanged(self, message: tuple[str | None, Any]) -> list[Any]:
        held: list[Any] = [None] * self.count
        dist.all_gather_object(held, message)
        for rank, (why, _) in enumerate(held):
            if why is not None:
                raise OtherRankError(f"rank {rank} failed: {why}")
        return [value for _, value in held]


def share_of_rank(samples: Samples, ranks: Ranks) -> tuple[Samples, range]:
    """Return this rank's part of the samples, every `count`-th, and their places."""
    places = range(ranks.index, len(samples), ranks.count)
    return (samples if ranks.count == 1 else samples.at(places)), places
