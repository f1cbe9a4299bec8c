"""Many variants of each sample, in passes of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_interp.attribution.engine.target import Target


def batches_of_variants(
    n: int, variants: int, batch_size: int, target: Target, device: torch.device
) -> Iterator[tuple[Int[Tensor, " m"], Int[Tensor, " m"]]]:
    """Yield (sample, variant) pairs until all are through, at most `batch_size` at a time.

    Where the target is a function of the outputs, which may expect the whole batch, all samples go together, one
    variant at a time.
    """
    if callable(target):
        for variant in range(variants):
            yield torch.arange(n, device=device), torch.full((n,), variant, device=device)
        return
    for part in torch.arange(n * variants, device=device).split(batch_size):
        yield part // variants, part % variants


def of_rows(target: Target, rows: Int[Tensor, " m"]) -> Int[Tensor, " m"] | Callable[[Tensor], Tensor]:
    """Return the target of the given samples."""
    return target if callable(target) else target.to(rows.device)[rows]
