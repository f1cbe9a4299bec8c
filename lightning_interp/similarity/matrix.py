"""All pairs of layers at once: each layer prepared once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.checks import tag
from lightning_interp.similarity.representation import FORMS, Form, Representation, prepare


@runtime_checkable
class Measure(Protocol):
    """A similarity of two prepared layers; `CKA` and `SVCCA` are such.

    A measure may have more members. Those that it lacks have a default, so that a `name` and a `between` are enough:

    - `needs`: the form that layers must be kept in, "gram", "scores" or "features" (see `Representation`); "scores".
    - `symmetric`: True where `between(x, y)` equals `between(y, x)`, so that half of a table is enough; False.
    - `distance`: True where 0 means the same, as for an angle; False.
    - `caution(x)`: a `Caution` where comparisons with this layer should not be trusted, else None; never one.
    - `chance(x, y)`: the mean over permutations of y's samples, a number, where a formula gives it; None where none
      does for these options. It is then known for every pair of layers; else a few permutations estimate it for layers
      of the same name.
    - `standard_error(x, y)`: how much a value varies with the choice of samples, a number; NaN, "not known".
    """

    @property
    def name(self) -> str:
        """Tag under which its numbers are logged."""

    def between(self, x: Representation, y: Representation) -> Tensor:
        """Return a scalar tensor."""


AnyMeasure = Measure | Callable[[Tensor, Tensor], Tensor]


def needs(measures: Sequence[AnyMeasure], compact: bool = False) -> Form:
    """Return the form in which layers must be kept for all measures; a plain function of two tensors needs features.

    Args:
        measures: those that the layers will be compared by.
        compact: keep no more than an n × n matrix of a layer even if they need more: wider layers lose the basis of
            their neurons, which few measures depend on.
    """
    form = max(map(_form_needed, measures), key=FORMS.index)
    return "scores" if compact and form == "features" else form


def _form_needed(measure: AnyMeasure) -> Form:
    form: Form = getattr(measure, "needs", "scores" if hasattr(measure, "between") else "features")
    if form not in FORMS:
        raise ValueError(f"{tag(measure)}.needs: expected one of {', '.join(FORMS)}, got {form!r}")
    return form


def similarity(measure: AnyMeasure, x: Representation, y: Representation) -> Tensor:
    """Compare two layers by any measure; NaN where they were not kept in the form it needs, or rows differ.

    A user's function that fails on layers of different widths gives NaN for them, too: it may be meant for equal ones.
    """
    if x.n != y.n:
        return torch.tensor(torch.nan)
    if hasattr(measure, "between"):
        return as_number(measure.between(x, y), f"{tag(measure)}.between")
    if x.features is None or y.features is None:
        return torch.tensor(torch.nan)
    try:
        return as_number(measure(x.features, y.features), tag(measure))
    except Exception:
        if x.width == y.width:
            raise
        return torch.tensor(torch.nan)


def as_number(value: Any, source: str) -> Float[Tensor, ""]:
    """Return what a measure gave as a scalar tensor; of Python's and NumPy's numbers in float64.

    Raises:
        TypeError: it is no number.
    """
    number = (
        torch.tensor(value, dtype=torch.float64) if isinstance(value, (float, int, np.number, np.ndarray)) else value
    )
    if not isinstance(number, Tensor) or number.numel() != 1:
        shown = f"shape {tuple(number.shape)}" if isinstance(number, Tensor) else repr(value)
        raise TypeError(f"{source}: expected a number, got {shown}")
    return number.reshape(())


def matrix(
    measure: AnyMeasure,
    xs: Sequence[Representation | Tensor],
    ys: Sequence[Representation | Tensor] | None = None,
) -> Float[Tensor, "x y"]:
    """Compare each of `xs` with each of `ys` (with each other when None).

    Args:
        measure: `CKA()`, `SVCCA()`, any with a `between`, or a function of two `(n, d)` tensors.
        xs: prepared layers or features `(n, d)`.
        ys: the same.

    Returns:
        One row per x, one column per y; NaN where a measure is not defined.

    Raises:
        ValueError: features are of different numbers of samples.
        TypeError: the measure is a class, or gave no number.

    >>> x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    >>> from lightning_interp.similarity.cka import CKA
    >>> matrix(CKA(), [x, 3 * x]).round(decimals=6).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    if isinstance(measure, type):
        raise TypeError(f"measure: expected one such as CKA(), got the class {measure.__name__}")
    if len(sizes := {len(x) for x in (*xs, *(ys or ())) if isinstance(x, Tensor)}) > 1:
        raise ValueError(f"xs, ys: expected features of the same samples, got {sorted(sizes)} of them")
    left = [_as_representation(x) for x in xs]
    right = left if ys is None else [_as_representation(y) for y in ys]
    symmetric = ys is None and getattr(measure, "symmetric", False)
    values = torch.empty(len(left), len(right), dtype=torch.float64)
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            values[i, j] = values[j, i] if symmetric and j < i else similarity(measure, x, y)
    return values


def _as_representation(x: Representation | Tensor) -> Representation:
    return prepare(x) if isinstance(x, Tensor) else x
