"""Which curvature a network of this size gets, and why."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_interp.data.batch import slice_samples
from lightning_interp.influence.curvature import EKFAC, Curvature, GaussNewton
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.gradients.coverage import Coverage
from lightning_interp.influence.gradients.per_sample import PerSampleGradients

SMALL = 1024
COLUMNS = 1024
FEWEST = 512
STORED = 2**24


def default_curvature(coverage: Coverage, few: Any, damping: Damping | None) -> tuple[Curvature, str]:
    """Return a curvature for a network, and the reason in words.

    Where the damping is known (the exact matrix needs the right one): `GaussNewton()`, all of it, of up to 1,024
    parameters; `GaussNewton(columns=...)` with 1,024 columns, or as many as fit in 64 MB if these are 512 or more. Else
    `EKFAC()`, which asks less of both.

    Args:
        coverage: the covered network.
        few: samples to measure on.
        damping: what the user gave, or what was recorded.
    """
    if damping is None:
        return EKFAC(), "EKFAC was chosen: without a recorded or given damping it is the safer curvature"
    if coverage.size <= SMALL:
        return GaussNewton(), f"GaussNewton was chosen: the exact matrix of {coverage.size:,} parameters is small"
    held = _held(coverage, few, damping)
    columns = min(COLUMNS, STORED // held)
    if columns < FEWEST:
        return (
            EKFAC(),
            f"EKFAC was chosen: {FEWEST:,} columns of the exact matrix would take {_mb(FEWEST * held):,.0f} MB",
        )
    return (
        GaussNewton(columns=columns),
        f"GaussNewton was chosen: {columns:,} columns of the exact matrix take {_mb(columns * held):,.1f} MB",
    )


def _held(coverage: Coverage, few: Any, damping: Damping) -> int:
    """Return how many numbers a column takes: its factors, but the gradient where damping differs within a block."""
    shift = damping.shift(coverage)
    rows = PerSampleGradients(coverage.watched_model, slice_samples(few, 0, 1)).loss_gradients()
    return sum(
        row.size if isinstance(shift[name], Tensor) else min(row.stored_elements, row.size)
        for name, row in rows.items()
    )


def _mb(numbers: int) -> float:
    return numbers * 4 / 2**20


def weighted_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear and convolutional layers whose weights are trained, in their order."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [name for name, part in model.named_modules() if isinstance(part, kinds) and part.weight.requires_grad]
