"""What an influence estimator costs: epochs, passes of the network, memory."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.influence_data import BATCH, Case
from benchmarks.timing import Work, cpu_seconds

EPOCHS = 5


def epoch(case: Case) -> None:
    """One forward and backward of every training sample, in slices of 64 of the tensors in memory."""
    parameters = list(case.net.parameters())
    for x, y in zip(*(tensor.split(BATCH) for tensor in case.train.tensors), strict=True):
        torch.autograd.grad(F.cross_entropy(case.net(x), y), parameters)


def epoch_of_loader(case: Case) -> None:
    """The same through a DataLoader."""
    parameters = list(case.net.parameters())
    for x, y in DataLoader(case.train, BATCH):
        torch.autograd.grad(F.cross_entropy(case.net(x), y), parameters)


def in_epochs(work: Work, case: Case) -> float:
    """Return a work's CPU time in units of the median epoch just before and just after it."""
    before = [cpu_seconds(partial(epoch, case)) for _ in range(EPOCHS)]
    cost = cpu_seconds(work)
    after = [cpu_seconds(partial(epoch, case)) for _ in range(EPOCHS)]
    return cost / statistics.median(before + after)


@dataclass
class Passes:
    """Rows that went forward through a network, and rows whose gradient came back from its output."""

    forward: float = 0
    backward: float = 0

    @contextlib.contextmanager
    def counted(self, nets: Iterable[nn.Module], classes: int = 10) -> Iterator[Passes]:
        """Count while the context is open; copies of the networks are counted too."""

        def came_back(gradient: Tensor) -> None:
            self.backward += _elements(gradient) / classes

        def went(part: nn.Module, given: Any, output: Tensor) -> None:
            self.forward += _elements(output) / classes
            if output.requires_grad:
                output.register_hook(came_back)

        handles = [net.register_forward_hook(went) for net in nets]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def _elements(tensor: Tensor) -> int:
    """Return the number of elements, those over which `torch.func` maps included."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.numel()
