"""CKA of sets too large for one Gram matrix, batch by batch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from lightning_interp.representation import check_features


class StreamingCKA(Metric):
    """Exact linear CKA over any number of batches, equal to `CKA()` on all samples at once.

    ‖XᵀY‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) of features centred over all samples, from sums of products in float64: the states
    are summed over ranks, so that it is exact under DDP, too. Memory is 8 bytes times (d_x + d_y)²; a mean of per-batch
    values would be wrong, however large the batches.

    Reference: Kornblith et al., Similarity of Neural Network Representations Revisited, 2019.

    Args:
        width_x: number of features d_x of one side.
        width_y: number of features d_y of the other.

    >>> metric = StreamingCKA(3, 3)
    >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    >>> for batch in x.split(16):
    ...     metric.update(batch, 2 * batch + 1)
    >>> round(metric.compute().item(), 6)
    1.0
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(self, width_x: int, width_y: int) -> None:
        super().__init__()
        for name, width in (("width_x", width_x), ("width_y", width_y)):
            if not isinstance(width, int) or width < 1:
                raise ValueError(f"StreamingCKA({name}=...): expected a whole number from 1, got {width!r}")
        self.widths = (width_x, width_y)
        wide = width_x + width_y
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(wide, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(wide, wide, dtype=torch.float64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)
        self.count: Tensor
        self.sums: Tensor
        self.products: Tensor

    def update(self, x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> None:
        """Add a batch.

        Args:
            x: `(n, width_x)` features.
            y: `(n, width_y)` features of the same samples.

        Raises:
            ValueError: the shapes do not fit, or values are not finite.
        """
        for name, features, width in (("x", x, self.widths[0]), ("y", y, self.widths[1])):
            check_features(features, name, fewest=1)
            if features.shape != (len(x), width):
                raise ValueError(f"{name}: expected shape ({len(x)}, {width}), got {tuple(features.shape)}")
        both = torch.cat([x, y], dim=1).detach().to(self.sums)
        self.count += len(both)
        self.sums += both.sum(0)
        self.products += both.T @ both

    def compute(self) -> Float[Tensor, ""]:
        """Return CKA of all samples so far; NaN if a side is constant."""
        means = self.sums / self.count
        centred = self.products - self.count * torch.outer(means, means)
        split = self.widths[0]
        xx, yy, xy = centred[:split, :split], centred[split:, split:], centred[:split, split:]
        return xy.square().sum() / (xx.norm() * yy.norm())
