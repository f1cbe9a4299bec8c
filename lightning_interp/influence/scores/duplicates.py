"""Training samples that equal a query, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# By the bytes of an element: bits are summed as integers, which do not round.
INTEGER_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Duplicates:
    """Finds queries among samples that are added batch by batch.

    Args:
        queries: their inputs, in the batches that they came in.
    """

    def __init__(self, queries: Sequence[Tensor]) -> None:
        self._queries = [row.detach().cpu() for batch in queries for row in batch]
        self._checksums = torch.stack([_checksum(query[None])[0] for query in self._queries])
        self.pairs: list[tuple[int, int]] = []
        self._count = 0

    def add(self, batch: Tensor) -> None:
        """Note which of the next samples equal a query: (query, position among all samples added)."""
        batch = batch.detach().cpu()
        # Different samples rarely share a checksum, so that few are compared in full.
        candidates = (_checksum(batch)[:, None] == self._checksums[None, :]).nonzero().tolist()
        for row, query in candidates:
            if torch.equal(batch[row], self._queries[query]):
                self.pairs.append((query, self._count + row))
        self._count += len(batch)


def _checksum(batch: Tensor) -> Tensor:
    """Return an integer per sample, the same for equal samples: exact in any order of summation."""
    bits = batch.contiguous().flatten(1) if batch.ndim > 1 else batch.contiguous()[:, None]
    return bits.view(INTEGER_TYPES[bits.element_size()]).sum(1, dtype=torch.int64)
