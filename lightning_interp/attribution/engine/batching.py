"""Many variants of each sample, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_interp.attribution.engine.target import Target


def batches_of_variants(
    n: int, variants: int, batch_size: int, target: Target, device: torch.device
) -> Iterator[tuple[Int[Tensor, " m"], Int[Tensor, " m"]]]:
    """Yield all (sample, variant) pairs, at most `batch_size` at a time.

    A target that is a function of the outputs may expect the whole batch: all samples then come together, one variant
    at a time.
    """
    if callable(target):
        for variant in range(variants):
            yield torch.arange(n, device=device), torch.full((n,), variant, device=device)
        return
    for pairs in torch.arange(n * variants, device=device).split(batch_size):
        yield pairs // variants, pairs % variants


def of_rows(target: Target, rows: Int[Tensor, " m"]) -> Int[Tensor, " m"] | Callable[[Tensor], Tensor]:
    """Return the target of the given samples."""
    return target if callable(target) else target.to(rows.device)[rows]
