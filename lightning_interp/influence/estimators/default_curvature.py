"""The default curvature, by the size of the network."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_interp.influence.curvature import EKFAC, Curvature, GaussNewton
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.gradients.coverage import Coverage

SMALL = 1024  # parameters: their exact matrix takes 8 MB in float64
DEFAULT_COLUMNS = 1024  # of the exact matrix, where so many fit
FEWEST_COLUMNS = 512  # where fewer fit, EK-FAC, which sums over more of them in the same memory, is preferred
MOST_STORED = 2**24  # elements of all columns: 64 MB in float32


def default_curvature(coverage: Coverage, damping: Damping | None) -> tuple[Curvature, str]:
    """Return a curvature for a network, and the reason in words.

    Where the damping is known (the exact matrix needs the right one): `GaussNewton()`, all of it, of up to 1,024
    parameters; `GaussNewton(columns=...)` with 1,024 columns, or as many as fit in 64 MB if these are 512 or more. Else
    `EKFAC()`, which needs less memory and no exact damping.

    Args:
        coverage: the covered network.
        damping: what the user gave, or what was recorded.
    """
    if damping is None:
        return EKFAC(), "EKFAC was chosen: without a recorded or given damping it is the safer curvature"
    if coverage.size <= SMALL:
        return GaussNewton(), f"GaussNewton was chosen: the exact matrix of {coverage.size:,} parameters is small"
    per_column = _elements_per_column(coverage, damping)
    columns = min(DEFAULT_COLUMNS, MOST_STORED // per_column)
    if columns < FEWEST_COLUMNS:
        megabytes = _megabytes(FEWEST_COLUMNS * per_column)
        return (
            EKFAC(),
            f"EKFAC was chosen: {FEWEST_COLUMNS:,} columns of the exact matrix would take {megabytes:,.0f} MB",
        )
    megabytes = _megabytes(columns * per_column)
    return (
        GaussNewton(columns=columns),
        f"GaussNewton was chosen: {columns:,} columns of the exact matrix take {megabytes:,.1f} MB",
    )


def _elements_per_column(coverage: Coverage, damping: Damping) -> int:
    """Return how many numbers a column takes: its factors, but the gradient where damping differs within a block."""
    shift, factors = damping.shift(coverage), coverage.memory.factors
    sizes = {name: block.size for name, block in coverage.blocks.items()}
    return sum(size if isinstance(shift[name], Tensor) else min(factors[name], size) for name, size in sizes.items())


def _megabytes(elements: int) -> float:
    return elements * 4 / 2**20


def weighted_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear and convolutional layers whose weights are trained, in their order."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    modules = model.named_modules()
    return [name for name, module in modules if isinstance(module, kinds) and module.weight.requires_grad]
