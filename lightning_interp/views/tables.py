"""Tables as text: Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text, a heading first, as a table in Markdown.

    >>> print(as_markdown([("layer", "value"), ("conv1", "0.5")]))
    | layer | value |
    |---|---|
    | conv1 | 0.5 |
    """
    heading, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([heading, "|---" * len(rows[0]) + "|", *others])


def as_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV: floats with six significant digits, and an empty cell for NaN.

    >>> as_csv(("layer", "value"), [("conv1", 0.5), ("conv2", float("nan"))]).splitlines()
    ['layer,value', 'conv1,0.5', 'conv2,']
    """
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_csv_cell(value) for value in row] for row in rows)
    return buffer.getvalue()


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"
