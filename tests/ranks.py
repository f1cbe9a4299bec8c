"""Two processes that share work, as two ranks of a distributed run do."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def run_on_two_ranks(function: Callable[[int, str], None], folder: Path) -> None:
    """Call `function(rank, folder)` in two processes that talk over gloo.

    They are forked from a server that imports the package once: a process of its own would take seconds for it. They
    meet in a file, so that tests that run side by side need no ports of their own.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["lightning_interp", "tests.models"])
    torch.multiprocessing.start_processes(_be_a_rank, (function, str(folder)), nprocs=2, start_method="forkserver")


def _be_a_rank(rank: int, function: Callable[[int, str], None], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    function(rank, folder)
    dist.destroy_process_group()
