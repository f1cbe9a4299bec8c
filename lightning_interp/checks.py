"""Checks of arguments and names: the error that stops a run before its first batch, counts, tags, tables."""

from __future__ import annotations

import re
from typing import Any


class ArgumentError(ValueError):
    """An argument, or the data that it defaults to, cannot be used; the message names it."""


def check_count(owner: str, argument: str, value: object, least: int = 1) -> None:
    """Raise a ValueError unless a count is a whole number, `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{owner}({argument}=...): expected a whole number from {least}, got {value!r}")


def check_counts(owner: str, **counts: object) -> None:
    """Raise a ValueError unless each count is a whole number from 1, or None."""
    for argument, value in counts.items():
        if value is not None:
            check_count(owner, argument, value)


def tag(method: Any) -> str:
    """Return the name under which a measure, attributor or estimator is logged.

    Its `name`, else its `__name__`, else its `repr`.

    >>> tag(len), tag(3)
    ('len', '3')
    """
    return str(getattr(method, "name", None) or getattr(method, "__name__", None) or repr(method))


def clean(name: str) -> str:
    """Return a tag with `_` for every character but letters, digits and `-_./`, as TensorBoard would rewrite it.

    >>> clean("vs initial/block.0#1")
    'vs_initial/block.0_1'
    """
    return re.sub(r"[^-\w./]", "_", name, flags=re.ASCII)


def dataset_in_words(dataset: Any) -> str | None:
    """Return a data set's class and length, which are the same in a resumed run; None for None.

    >>> dataset_in_words([1, 2, 3])
    'list of 3'
    """
    if dataset is None:
        return None
    try:
        return f"{type(dataset).__name__} of {len(dataset)}"
    except TypeError:
        return f"{type(dataset).__name__} of unknown length"
