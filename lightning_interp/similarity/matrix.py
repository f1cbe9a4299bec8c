"""All pairs of layers at once: each layer prepared once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.records import Representation
from lightning_interp.similarity.representation import prepare


@runtime_checkable
class Measure(Protocol):
    """A similarity of two prepared layers; `CKA` and `SVCCA` are such."""

    @property
    def name(self) -> str:
        """Tag under which its numbers are logged."""

    def between(self, x: Representation, y: Representation) -> Tensor:
        """Return a scalar tensor."""


def matrix(
    measure: Measure,
    xs: Sequence[Representation | Tensor],
    ys: Sequence[Representation | Tensor] | None = None,
) -> Float[Tensor, "x y"]:
    """Compare each of `xs` with each of `ys` (with each other when None).

    Args:
        measure: `CKA()`, `SVCCA()` or any with a `between`.
        xs: prepared layers or features `(n, d)`.
        ys: the same.

    >>> x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    >>> from lightning_interp.similarity.cka import CKA
    >>> matrix(CKA(), [x, 3 * x]).round(decimals=6).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    left = [_prepared(x) for x in xs]
    right = left if ys is None else [_prepared(y) for y in ys]
    values = torch.empty(len(left), len(right), dtype=torch.float64)
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            known = ys is None and j < i
            values[i, j] = values[j, i] if known else measure.between(x, y)
    return values


def _prepared(x: Representation | Tensor) -> Representation:
    return prepare(x) if isinstance(x, Tensor) else x.double()
