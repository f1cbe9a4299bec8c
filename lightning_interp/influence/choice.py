"""Which curvature a network of this size gets, and why."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_interp.batch import take
from lightning_interp.influence.coverage import Coverage
from lightning_interp.influence.curvature import EKFAC, Curvature, GaussNewton
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.trace import Trace

COLUMNS = 1024
STORED = 2**25


def choose(coverage: Coverage, few: Any, damping: Damping | None) -> tuple[Curvature, str]:
    """Return a curvature for a network, and the reason in words.

    `GaussNewton(columns=1024)` where its columns fit in 128 MB and the damping is known (it needs the right one);
    else `EKFAC()`, which asks less of both.

    Args:
        coverage: the covered network.
        few: samples to measure on.
        damping: what the user gave, or what was recorded.
    """
    rows = Trace(coverage.watch, take(few, 0, 1)).loss_rows()
    held = COLUMNS * sum(min(row.held, row.size) for row in rows.values())
    if damping is None:
        return EKFAC(), "EKFAC was chosen: without a recorded or given damping it is the safer curvature"
    if held > STORED:
        return (
            EKFAC(),
            f"EKFAC was chosen: {COLUMNS:,} columns of the exact matrix would take {held * 4 / 2**20:,.0f} MB",
        )
    return (
        GaussNewton(columns=COLUMNS),
        f"GaussNewton was chosen: {COLUMNS:,} columns of the exact matrix take {held * 4 / 2**20:,.1f} MB",
    )


def weighted_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear and convolutional layers whose weights are trained, in their order."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [name for name, part in model.named_modules() if isinstance(part, kinds) and part.weight.requires_grad]
