"""Random generators that a dataset carries itself, put back after it was read."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

DEEPEST_ATTRIBUTE = 6
MOST_ITEMS = 100


@contextlib.contextmanager
def preserve_dataset_rng(owner: Any) -> Iterator[None]:
    """Restore every random generator that is reachable through an object's attributes.

    Generators of torch, NumPy (both kinds) and Python are found in attributes, lists and dicts, a few levels deep:
    a dataset, its transforms, the dataset inside a `Subset`.
    """
    restore = [_restorer(found) for found in _generators(owner, DEEPEST_ATTRIBUTE, set())]
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


def _restorer(generator: Any) -> Callable[[], object]:
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        kept = bits.state
        return lambda: setattr(bits, "state", kept)
    if isinstance(generator, np.random.RandomState):
        legacy = generator.get_state()
        return lambda: generator.set_state(legacy)
    python = generator.getstate()
    return lambda: generator.setstate(python)


def _generators(thing: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    if id(thing) in seen or depth < 0:
        return
    seen.add(id(thing))
    if isinstance(thing, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
        yield thing
        return
    for part in _children(thing):
        yield from _generators(part, depth - 1, seen)


def _children(thing: Any) -> list[Any]:
    if isinstance(thing, (torch.Tensor, np.ndarray, str, bytes, type)) or callable(getattr(thing, "__array__", None)):
        return []
    if isinstance(thing, dict):
        return list(thing.values()) if len(thing) <= MOST_ITEMS else []
    if isinstance(thing, (list, tuple)):
        return list(thing) if len(thing) <= MOST_ITEMS else []
    return list(getattr(thing, "__dict__", {}).values())
