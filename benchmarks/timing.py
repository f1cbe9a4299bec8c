"""CPU time as ratios to a bare run, and peak memory of a process of its own."""

from __future__ import annotations

import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Work = Callable[[], Any]


def cpu_seconds(work: Work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def ratios(
    works: Mapping[str, Work], bare: Mapping[str, Work], rounds: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Return each work's cost in the fastest bare runs of its round, and those runs' seconds."""
    times: dict[str, list[float]] = {name: [] for name in works}
    fastest = []
    for work in (*bare.values(), *works.values()):
        work()
    for _ in range(rounds):
        fastest.append(min(cpu_seconds(work) for work in bare.values()))
        for name, work in works.items():
            times[name].append(cpu_seconds(work) / fastest[-1])
    return times, fastest


def spread(values: Sequence[float]) -> str:
    low, high = np.percentile(values, [25, 75])
    return f"{statistics.median(values):.2f} ({low:.2f} to {high:.2f})"


def peak_mb(prepare: Callable[..., tuple[Work, Work]], *arguments: Any) -> float:
    """Return a work's peak memory in MB above what is held before, in a process of its own.

    Args:
        prepare: arguments → what is run before to warm up, and the work.
        arguments: such as can be pickled.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (prepare, arguments))


def _peak(prepare: Callable[..., tuple[Work, Work]], arguments: tuple[Any, ...]) -> float:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warm, work = prepare(*arguments)
    warm()
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    before = _peak_so_far()
    work()
    return _peak_so_far() - before


def _peak_so_far() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6
