"""Several processes that share the work: each takes its share of the samples, and gathers what the others computed."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist

from lightning_interp.data.samples import Samples


class OtherRankError(RuntimeError):
    """Another rank failed, and reported it."""


@runtime_checkable
class Ranks(Protocol):
    """How many processes there are, and a way to exchange values."""

    index: int
    count: int

    def gather(self, value: Any) -> list[Any]:
        """Return each rank's value, in their order; all ranks call it."""

    def report_failure(self, why: str) -> None:
        """Let the other ranks, which wait in `gather`, fail as well instead of waiting for ever."""


class SingleProcess:
    """One process."""

    index, count = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """Return the value itself."""
        return [value]

    def report_failure(self, why: str) -> None:
        """Do nothing: there is no other rank."""


class Distributed:
    """The processes of `torch.distributed`'s default group."""

    def __init__(self) -> None:
        self.index, self.count = dist.get_rank(), dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """Return each rank's value.

        Raises:
            OtherRankError: another rank reported a failure instead.
        """
        return self._exchange((None, value))

    def report_failure(self, why: str) -> None:
        """Take part in the other ranks' next `gather` with a failure in place of a value."""
        try:
            self._exchange((why, None))
        except OtherRankError:  # this rank's own report, or that of one that failed as well
            return

    def _exchange(self, message: tuple[str | None, Any]) -> list[Any]:
        messages: list[Any] = [None] * self.count
        dist.all_gather_object(messages, message)
        for rank, (why, _) in enumerate(messages):
            if why is not None:
                raise OtherRankError(f"rank {rank} failed: {why}")
        return [value for _, value in messages]


def share_of_rank(samples: Samples, ranks: Ranks) -> tuple[Samples, range]:
    """Return this rank's share of the samples, every `count`-th, and their indices."""
    indices = range(ranks.index, len(samples), ranks.count)
    return (samples if ranks.count == 1 else samples.at(indices)), indices
