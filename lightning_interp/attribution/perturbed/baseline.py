"""Baselines: the value that switched-off parts of an input take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Baseline = int | float | Sequence[float] | Tensor | Callable[[Tensor], Tensor]


def baseline_like(baseline: Baseline, values: Tensor) -> Tensor:
    """Return the baseline in the shape of `values`, `(n, ...)`: floats, or token ids.

    Args:
        baseline: a number (for token ids, the mask or padding token); a sequence with one number per channel, or per
            column of a table; a tensor in the shape of one sample, or of all; or a function values → baseline, e.g. a
            blur.
        values: what it replaces.

    Raises:
        ValueError: it does not fit the shape.
    """
    if callable(baseline):
        tensor = baseline(values)
    elif isinstance(baseline, Tensor):
        tensor = baseline.to(values)
    else:
        tensor = torch.as_tensor(baseline, dtype=values.dtype, device=values.device)
        if tensor.ndim == 1 and values.ndim > 2:
            tensor = tensor.reshape(-1, *[1] * (values.ndim - 2))
    try:
        return tensor.detach().expand_as(values)
    except RuntimeError:
        raise ValueError(
            f"baseline: expected a number, one per channel, or a tensor {tuple(values.shape[1:])}, got"
            f" {tuple(tensor.shape)}"
        ) from None
