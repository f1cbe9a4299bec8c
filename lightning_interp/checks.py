"""Names and arguments, checked: the error that stops a run before its first batch, counts, tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


class ArgumentError(ValueError):
    """An argument, or the data that stands in for it, cannot be used; the message names it."""


def check_count(owner: str, argument: str, value: object, least: int = 1) -> None:
    """Raise a ValueError unless a count is a whole number that is large enough."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{owner}({argument}=...): expected a whole number from {least}, got {value!r}")


def check_counts(owner: str, **counts: object) -> None:
    """Raise a ValueError unless each count is a whole number from 1, or None."""
    for argument, value in counts.items():
        if value is not None:
            check_count(owner, argument, value)


def tag(part: Any) -> str:
    """Return the name under which a measure, attributor or estimator is logged.

    Its `name`, else its `__name__`, else its `repr`.

    >>> tag(len), tag(3)
    ('len', '3')
    """
    return str(getattr(part, "name", None) or getattr(part, "__name__", None) or repr(part))


def clean(name: str) -> str:
    """Return a tag of letters, digits and `-_./` alone: TensorBoard rewrites any other character.

    >>> clean("vs initial/block.0#1")
    'vs_initial/block.0_1'
    """
    return re.sub(r"[^-\w./]", "_", name, flags=re.ASCII)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text, a heading first, as a table in Markdown."""
    heading, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([heading, "|---" * len(rows[0]) + "|", *others])
