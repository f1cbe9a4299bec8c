"""CKA of sets too large for one Gram matrix, batch by batch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from lightning_interp.representation import check_features


class StreamingCKA(Metric):
    """Exact linear CKA over any number of batches, equal to `CKA()` or `CKA(debiased=True)` on all samples at once.

    ‖XᵀY‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) of features centred over all samples, from sums of products in float64; for the
    debiased one, what HSIC₁ takes off follows from the samples' squared lengths and their products with the features.
    All states are sums, added up over ranks, so that it is exact under DDP, too. Memory is 8 bytes times (d_x + d_y)²;
    a mean of per-batch values would be wrong, however large the batches.

    Reference: Kornblith et al., Similarity of Neural Network Representations Revisited, 2019; Song et al.,
    Feature Selection via Dependence Maximization, 2012.

    Args:
        width_x: number of features d_x of one side.
        width_y: number of features d_y of the other.
        debiased: use the unbiased estimate of HSIC in all three terms; needs four samples.

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

    def __init__(self, width_x: int, width_y: int, debiased: bool = False) -> None:
        super().__init__()
        for name, width in (("width_x", width_x), ("width_y", width_y)):
            if not isinstance(width, int) or width < 1:
                raise ValueError(f"StreamingCKA({name}=...): expected a whole number from 1, got {width!r}")
        self.widths = (width_x, width_y)
        self.debiased = debiased
        wide = width_x + width_y
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(wide, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(wide, wide, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("lengths", torch.zeros(2, 2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("along", torch.zeros(2, wide, dtype=torch.float64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)
        self.count: Tensor
        self.sums: Tensor
        self.products: Tensor
        self.lengths: Tensor
        self.along: Tensor

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
        lengths = torch.stack([side.square().sum(1) for side in both.split(self.widths, dim=1)])
        self.lengths += lengths @ lengths.T
        self.along += lengths @ both

    def compute(self) -> Float[Tensor, ""]:
        """Return CKA of all samples so far; NaN if a side is constant.

        Raises:
            ValueError: debiased, of fewer than four samples.
        """
        if self.debiased and self.count < 4:
            raise ValueError(f"StreamingCKA(debiased=True): expected at least 4 samples, got {int(self.count)}")
        means = self.sums / self.count
        centred = self.products - self.count * torch.outer(means, means)
        xx, xy, yy = (self._hsic(centred, means, a, b) for a, b in ((0, 0), (0, 1), (1, 1)))
        return xy / (xx * yy).clamp(min=0).sqrt()

    def _hsic(self, centred: Tensor, means: Tensor, a: int, b: int) -> Tensor:
        """Return tr(K L) of sides a and b, or n(n−3) HSIC₁."""
        sides = (slice(0, self.widths[0]), slice(self.widths[0], None))
        trace = centred[sides[a], sides[b]].square().sum()
        if not self.debiased:
            return trace
        n, diagonals = self.count, self._diagonals(means, sides, a, b)
        totals = centred.diagonal()[sides[a]].sum() * centred.diagonal()[sides[b]].sum()
        return trace - diagonals + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * diagonals

    def _diagonals(self, means: Tensor, sides: tuple[slice, slice], a: int, b: int) -> Tensor:
        """Return Σ_i K_ii L_ii of the centred Gram matrices, with K_ii = |x_i|² − 2 x_iᵀm + |m|²."""
        p, q = means[sides[a]], means[sides[b]]
        inner = p @ self.products[sides[a], sides[b]] @ q
        totals = [self.products.diagonal()[side].sum() for side in (sides[a], sides[b])]
        norms = p @ p, q @ q
        return (
            self.lengths[a, b]
            - 2 * (self.along[a, sides[b]] @ q + self.along[b, sides[a]] @ p)
            + 4 * inner
            + norms[1] * (totals[0] - 2 * self.count * norms[0])
            + norms[0] * (totals[1] - 2 * self.count * norms[1])
            + self.count * norms[0] * norms[1]
        )
