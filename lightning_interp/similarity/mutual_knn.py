"""Mutual nearest neighbours: how far two layers agree on which samples are alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_interp.checks import check_count
from lightning_interp.similarity.representation import Representation, prepare, same_samples
from lightning_interp.similarity.results import Caution
from lightning_interp.similarity.significance import FEWEST_FOR_JACKKNIFE, jackknife_standard_error

DISTANCE_ROUNDING = 32  # eps · (|x_i|² + |x_j|²) that |x_i − x_j|² may be off: measured up to 19, in float32
MANY_TIES = 1.1  # neighbours per sample over k from which the caution applies: a tenth more than k


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Which samples are among each sample's nearest ones, a row for each sample.

    Args:
        nearest: those no further away than the k-th nearest, itself left out.
        one_more: those no further away than the next one, k + 1.
        determined: whether distances differ at all; else no sample is nearer than another.
    """

    nearest: Bool[Tensor, "n n"]
    one_more: Bool[Tensor, "n n"]
    determined: bool


@dataclass(frozen=True)
class MutualKNN:
    """Mutual k-nearest-neighbour overlap: the share of each sample's neighbours that two layers have in common.

    1/n Σ_i |N_x(i) ∩ N_y(i)| / max(|N_x(i)|, |N_y(i)|), N(i) the k samples at the least Euclidean distance from sample
    i, itself left out. In [0, 1], 1 meaning the same neighbours, k / (n − 1) by chance. It depends on the local
    structure alone: which samples are near, not how near, nor how groups lie to each other; more global with larger k.
    Invariant to rotations, shifts and a scale for each layer; not to general linear maps. Values of different n or k
    do not compare. The paper's experiments first clip the largest 5% of a layer's numbers and divide each sample by its
    length, so that the nearest are those at the least angle; here the features are taken as they are.

    Ties: all samples as far away as the k-th nearest are neighbours, so that the order of the samples never matters, a
    layer is equal to itself, and one whose samples fall into groups of duplicates is compared by its groups. Then there
    are more than k neighbours, and chance is higher. Squared distances count as equal where they differ by less than
    about 1e-5 of the samples' mean square length around the mean (float32; what rounding can do). NaN where all
    distances of a layer are equal.

    Reference: Huh et al., The Platonic Representation Hypothesis, 2024.

    Args:
        k: neighbours of each sample, from 1 to n − 1.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    >>> MutualKNN(k=1)(x, x.square()).item(), MutualKNN(k=1)(x, x[[0, 2, 1, 3]]).item()
    (1.0, 0.0)
    """

    k: int = 10

    def __post_init__(self) -> None:
        check_count("MutualKNN", "k", self.k)

    symmetric: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Tag of the measure."""
        return f"MutualKNN_{self.k}"

    def __call__(self, x: Float[Tensor, "n d1"], y: Float[Tensor, "n d2"]) -> Float[Tensor, ""]:
        """Compare two sets of features of the same samples; NaN if all distances in one are equal."""
        return self.between(prepare(x), prepare(y))

    def between(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Compare two prepared layers.

        Raises:
            ValueError: there are no more than k samples, or a layer was kept as a rounded Gram matrix.
        """
        a, b = self._both(x, y)
        if not (a.determined and b.determined):
            return _not_defined(a)
        return _overlap(a.nearest, b.nearest).mean()

    def chance(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Return the exact mean over all permutations of y's samples: k / (n − 1) without ties.

        Sample i meets each sample m of y equally often, and each of i's |N_x(i)| neighbours is among |N_y(m)| of n − 1:
        the mean over i and m of min(|N_x(i)|, |N_y(m)|) / (n − 1).
        """
        a, b = self._both(x, y)
        if not (a.determined and b.determined):
            return _not_defined(a)
        smaller = torch.minimum(a.nearest.sum(1)[:, None], b.nearest.sum(1))
        return smaller.double().mean() / (x.n - 1)

    def standard_error(self, x: Representation, y: Representation) -> Float[Tensor, ""]:
        """Return the jackknife standard error over samples: how much the value varies with their choice.

        Each of the n values of n − 1 samples is exact, the neighbours that a left-out sample leaves to others included.
        It is on the safe side: the mean of its square is never below the variance over fresh sets of n − 1 samples
        (Efron & Stein 1981); neighbourhoods jump as samples come and go, so that it is well above: 1.2 to 2 times the
        standard deviation for normal features, n from 60 to 500 and k from 5 to 20. Neglected are the dependence of the
        value on n itself, and samples that are not drawn independently, such as frames of one film. NaN for fewer than
        8 samples and for k = n − 1, where all n − 1 samples are too few for k neighbours.
        """
        a, b = self._both(x, y)
        if x.n < FEWEST_FOR_JACKKNIFE or self.k >= x.n - 1 or not (a.determined and b.determined):
            return _not_defined(a)
        return jackknife_standard_error(_overlap_without_each(a, b))

    def caution(self, x: Representation) -> Caution | None:
        """Say when a comparison with this layer should not be trusted."""
        count = float(self.neighbours(x).nearest.sum(1).double().mean())
        if count < MANY_TIES * self.k:
            return None
        return Caution("many samples equally far away, more neighbours than k", f"{count:.0f} neighbours")

    def neighbours(self, x: Representation) -> Neighbours:
        """Return each sample's neighbours in a layer, worked out once.

        Raises:
            ValueError: there are no more than k samples, or the layer was kept as a rounded Gram matrix.
        """
        if self.k >= x.n:
            raise ValueError(f"MutualKNN(k=...): expected a whole number from 1 to n − 1 = {x.n - 1}, got {self.k}")
        if not x.factorable:
            raise ValueError(
                "MutualKNN: expected layers in full precision, got a Gram matrix in half precision or of a sketch,"
                " in which rounding decides which samples are nearest"
            )
        return x.derived((self, "neighbours"), self._nearest)

    def _both(self, x: Representation, y: Representation) -> tuple[Neighbours, Neighbours]:
        same_samples(x, y)
        return self.neighbours(x), self.neighbours(y)

    def _nearest(self, x: Representation) -> Neighbours:
        lengths = x.gram.diagonal()
        sums = lengths[:, None] + lengths
        rounding = DISTANCE_ROUNDING * torch.finfo(torch.promote_types(x.values.dtype, torch.float32)).eps * sums
        squares = (sums - 2 * x.gram).fill_diagonal_(torch.inf)
        lowest = squares.topk(min(self.k + 1, x.n - 1), largest=False).values
        nearest, one_more, first = (
            squares <= lowest[:, rank, None] + rounding for rank in (self.k - 1, lowest.shape[1] - 1, 0)
        )
        return Neighbours(nearest, one_more, int(first.sum()) < x.n * (x.n - 1))


def _overlap(
    x: Bool[Tensor, "n n"], y: Bool[Tensor, "n n"], removed_x: int = 0, removed_y: int = 0
) -> Float[Tensor, " n"]:
    """Return each sample's share of common neighbours, after one neighbour is removed: of x, of y, the same of both."""
    shared = (x & y).sum(1) - removed_x * removed_y
    larger = torch.maximum(x.sum(1) - removed_x, y.sum(1) - removed_y)
    return shared.double() / larger


def _overlap_without_each(a: Neighbours, b: Neighbours) -> Float[Tensor, " n"]:
    """Return the measure of n − 1 samples, with each sample left out in turn.

    Without one of its neighbours a sample's next one moves up, or none where the k-th was tied: both is what `one_more`
    holds, less the one removed. All other samples keep their neighbours.
    """
    neither = _overlap(a.nearest, b.nearest)
    total = (~a.nearest & ~b.nearest).double().T @ neither - neither  # the left-out sample's own share goes, too
    total += (a.nearest & ~b.nearest).double().T @ _overlap(a.one_more, b.nearest, removed_x=1)
    total += (~a.nearest & b.nearest).double().T @ _overlap(a.nearest, b.one_more, removed_y=1)
    total += (a.nearest & b.nearest).double().T @ _overlap(a.one_more, b.one_more, removed_x=1, removed_y=1)
    return total / (len(neither) - 1)


def _not_defined(a: Neighbours) -> Float[Tensor, ""]:
    return torch.tensor(torch.nan, dtype=torch.float64, device=a.nearest.device)
