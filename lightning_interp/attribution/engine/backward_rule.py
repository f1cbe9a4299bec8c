"""A rule for the backward: some functions of the forward propagate something other than their gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import Protocol, runtime_checkable


@runtime_checkable
class BackwardRule(Hashable, Protocol):
    """Changes what flows back through some functions of a forward, and never what the forward computes.

    A rule is hashable, such as a frozen dataclass: methods of equal rules share a forward and backward. A rule may
    change any function: `ReluRule` replaces the backward of ReLUs, `EpsilonRule` that of linear layers; a rule for
    attention would hold its weights constant. A `TorchFunctionMode` is the usual way, since it sees modules, functions
    and methods alike and leaves the model as it is.
    """

    def opened(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which one forward runs; the backward may come after its end."""
