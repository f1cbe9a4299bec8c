"""Random generators that a dataset carries itself, restored after it was read."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

DEEPEST_ATTRIBUTE = 6  # Subset → dataset → transforms → Compose → list → transform → generator
MOST_ITEMS = 100  # a longer list or dict holds samples, not transforms, and would take long to walk


@contextlib.contextmanager
def preserve_dataset_rng(owner: Any) -> Iterator[None]:
    """Restore every random generator that is reachable through an object's attributes.

    Generators of torch, NumPy (both kinds) and Python are found in attributes, lists and dicts, a few levels deep:
    a dataset, its transforms, the dataset inside a `Subset`.
    """
    restorers = [_restorer(generator) for generator in _generators(owner, DEEPEST_ATTRIBUTE, set())]
    try:
        yield
    finally:
        for restore in restorers:
            restore()


def _restorer(generator: Any) -> Callable[[], object]:
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits_state = bits.state
        return lambda: setattr(bits, "state", bits_state)
    if isinstance(generator, np.random.RandomState):
        legacy = generator.get_state()
        return lambda: generator.set_state(legacy)
    python = generator.getstate()
    return lambda: generator.setstate(python)


def _generators(thing: Any, depth: int, visited: set[int]) -> Iterator[Any]:
    if id(thing) in visited or depth < 0:
        return
    visited.add(id(thing))
    if isinstance(thing, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
        yield thing
        return
    for child in _children(thing):
        yield from _generators(child, depth - 1, visited)


def _children(thing: Any) -> list[Any]:
    if isinstance(thing, (torch.Tensor, np.ndarray, str, bytes, type)) or callable(getattr(thing, "__array__", None)):
        return []
    if isinstance(thing, dict):
        return list(thing.values()) if len(thing) <= MOST_ITEMS else []
    if isinstance(thing, (list, tuple)):
        return list(thing) if len(thing) <= MOST_ITEMS else []
    return list(getattr(thing, "__dict__", {}).values())
