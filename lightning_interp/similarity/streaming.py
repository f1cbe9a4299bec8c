"""CKA of sets too large for one Gram matrix, batch by batch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from lightning_interp.checks import check_count
from lightning_interp.similarity.representation import check_features

SUM_ROUNDING = 16 * torch.finfo(torch.float64).eps  # relative error that sums of a constant side may have


class StreamingCKA(Metric):
    """Exact linear CKA over any number of batches, equal to `CKA()` or `CKA(debiased=True)` on all samples at once.

    ‖XᵀY‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) of features centred over all samples, from sums of products in float64; for the
    debiased one, what HSIC₁ subtracts follows from the samples' squared lengths and their products with the features.
    Each rank sums its samples less the mean of its first batch, so that an offset costs no digits; sums about one point
    follow exactly from those about another, so that ranks add up under DDP. Memory: 8 (d_x + d_y + 4)² bytes. A mean of
    per-batch values would be wrong, however large the batches.

    Reference: Kornblith et al., Similarity of Neural Network Representations Revisited, 2019; Song et al.,
    Feature Selection via Dependence Maximization, 2012; Chan et al., Computing the Sample Variance, 1983.

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
            check_count("StreamingCKA", name, width)
        self.widths = (width_x, width_y)
        self.debiased = debiased
        size = width_x + width_y + 3
        self.add_state("sums", torch.zeros(size + 1, size, dtype=torch.float64), dist_reduce_fx=self._merge)
        self.set_dtype(torch.float64)
        self.sums: Tensor

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
        features = torch.cat([x, y], dim=1).detach().to(self.sums)
        # The mean of the first batch is the point about which this rank sums.
        if not self.sums[0, 0]:
            self.sums[-1, 1:-2] = features.mean(0)
        shifted = features - self.sums[-1, 1:-2]
        lengths = [side.square().sum(1) for side in shifted.split(self.widths, dim=1)]
        rows = torch.column_stack([torch.ones_like(lengths[0]), shifted, *lengths])
        self.sums[:-1] += rows.T @ rows

    def compute(self) -> Float[Tensor, ""]:
        """Return CKA of all samples so far; NaN if a side is constant, up to rounding.

        Raises:
            ValueError: debiased, of fewer than four samples.
        """
        n = self.sums[0, 0]
        if self.debiased and n < 4:
            raise ValueError(f"StreamingCKA(debiased=True): expected at least 4 samples, got {int(n)}")
        sums = self._sums_about(self.sums, self.sums[-1, 1:-2] + self.sums[0, 1:-2] / n)
        xx, xy, yy = (self._hsic(sums, a, b) for a, b in ((0, 0), (0, 1), (1, 1)))
        norms = torch.where(self._varies(sums, 0) & self._varies(sums, 1), (xx * yy).clamp(min=0), 0)
        return xy / torch.where(norms > 0, norms, torch.nan).sqrt()

    def _hsic(self, sums: Tensor, a: int, b: int) -> Tensor:
        """Return tr(K L) of sides a and b, or n(n−3) HSIC₁, from sums about the mean."""
        trace = sums[self._side(a), self._side(b)].square().sum()
        if not self.debiased:
            return trace
        n, diagonals = sums[0, 0], sums[a - 3, b - 2]  # the last row is the point
        totals = sums[0, a - 2] * sums[0, b - 2]
        return trace - diagonals + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * diagonals

    def _varies(self, sums: Tensor, side: int) -> Tensor:
        """Say whether a side's squared lengths about the mean are more than rounding of the sums or of the features."""
        n, spread = sums[0, 0], sums[0, side - 2]
        total, offset = self.sums[0, side - 2], sums[-1, self._side(side)].square().sum()
        return (spread > SUM_ROUNDING * total) & (spread > n * SUM_ROUNDING**2 * offset)

    def _side(self, side: int) -> slice:
        return slice(1, 1 + self.widths[0]) if side == 0 else slice(1 + self.widths[0], 1 + sum(self.widths))

    def _sums_about(self, sums: Tensor, point: Tensor) -> Tensor:
        """Return the same sums about another point.

        A sample's row is w = (1, z, |z_x|², |z_y|²), z its features less the point, and the sums are Σ w wᵀ, with the
        point as a last row. Moving the point by m is the linear map 1 → 1, z → z − m, |z|² → |z|² − 2 mᵀz + |m|².
        """
        move = torch.zeros_like(sums[-1])
        move[1:-2] = point - sums[-1, 1:-2]
        about = sums.clone()
        about[:-1] = self._move_rows(self._move_rows(sums[:-1], move).T, move)
        about[-1, 1:-2] = point
        return about

    def _move_rows(self, sums: Tensor, move: Tensor) -> Tensor:
        result = sums - torch.outer(move, sums[0])
        for side in (0, 1):
            columns = self._side(side)
            shift = move[columns]
            result[side - 2] = sums[side - 2] - 2 * shift @ sums[columns] + shift.square().sum() * sums[0]
        return result

    def _merge(self, ranks: Float[Tensor, "ranks rows columns"]) -> Float[Tensor, "rows columns"]:
        """Return the sums of several ranks, or of a state and a batch, about the point of the first with samples."""
        point = ranks[int(ranks[:, 0, 0].ne(0).int().argmax()), -1, 1:-2]
        merged = torch.stack([self._sums_about(sums, point) for sums in ranks if sums[0, 0]] or [ranks[0]]).sum(0)
        merged[-1, 1:-2] = point
        return merged
