"""Scores compared with retraining: leave-one-out, leave-k-out and the linear datamodeling score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_interp.progress import Progress, quiet

TrainedModel = TypeVar("TrainedModel")
FEWEST_PAIRS = 3  # two points always correlate by ±1


@dataclass(frozen=True, eq=False)
class Retrained:
    """Predicted beside actual loss changes, of each query after each removal.

    All four numbers are taken over all pairs of a query and a removal. Pairs of one query are not independent, and
    removals that were picked for their large scores correlate better than random ones: report how they were picked.

    Args:
        predicted: `(q, m)`, in the unit of the loss; see `group_scores`.
        actual: `(q, m)`, in the same unit; see `leave_k_out`.

    Raises:
        ValueError: the shapes differ, or there are fewer than 3 pairs.
        FloatingPointError: values are not finite.
    """

    predicted: Float[Tensor, "q m"]
    actual: Float[Tensor, "q m"]

    def __post_init__(self) -> None:
        if self.predicted.shape != self.actual.shape or self.predicted.numel() < FEWEST_PAIRS:
            raise ValueError(
                "Retrained(predicted=..., actual=...): expected the same shape (q, m) with at least"
                f" {FEWEST_PAIRS} pairs, got {tuple(self.predicted.shape)} and {tuple(self.actual.shape)}"
            )
        _finite(self.predicted, "predicted")
        _finite(self.actual, "actual")

    @property
    def pearson(self) -> float:
        """Linear correlation; NaN if either side is constant."""
        return float(_correlation(*self._pairs()))

    @property
    def spearman(self) -> float:
        """Rank correlation, ties at their mean rank; NaN if either side is constant."""
        return float(_correlation(*map(_ranks, self._pairs())))

    @property
    def slope(self) -> float:
        """Least-squares slope of actual over predicted, with an intercept; 1 where the size is right too."""
        predicted, actual = (side - side.mean() for side in self._pairs())
        return float(predicted @ actual / (predicted @ predicted))

    @property
    def relative_error(self) -> float:
        """‖predicted − actual‖ / ‖actual‖."""
        predicted, actual = self._pairs()
        return float((predicted - actual).norm() / actual.norm())

    def _pairs(self) -> tuple[Tensor, Tensor]:
        return self.predicted.detach().cpu().double().flatten(), self.actual.detach().cpu().double().flatten()


def leave_one_out(
    retrain: Callable[[list[int]], TrainedModel],
    losses: Callable[[TrainedModel], Tensor],
    n: int,
    which: Sequence[int],
    progress: Progress = quiet,
) -> Float[Tensor, "q m"]:
    """Return how each query's loss moves when one training sample is left out: `leave_k_out` with groups of one.

    Args:
        retrain: indices of the samples to train on → trained model.
        losses: model → each query's loss, `(q,)`.
        n: number of training samples.
        which: the m samples that are left out, one at a time.
        progress: shows how far it got.
    """
    return leave_k_out(retrain, losses, n, [[index] for index in which], progress)


def leave_k_out(
    retrain: Callable[[list[int]], TrainedModel],
    losses: Callable[[TrainedModel], Tensor],
    n: int,
    groups: Sequence[Sequence[int]],
    progress: Progress = quiet,
) -> Float[Tensor, "q m"]:
    """Return how each query's loss moves when a group of training samples is left out: after minus before.

    actual[q, j] = ℓ_q(retrain(all but group j)) − ℓ_q(retrain(all)). "Before" goes through `retrain` as well, so that
    what training on does by itself cancels. Where `retrain` draws random numbers, the draws must be the same each time
    or averaged over, else their noise is measured.

    Reference: Koh & Liang, Understanding Black-box Predictions via Influence Functions, 2017 (groups of one); Koh et
    al., On the Accuracy of Influence Functions for Measuring Group Effects, 2019.

    Args:
        retrain: indices of the samples to train on, in rising order → trained model.
        losses: model → each query's loss, `(q,)`.
        n: number of training samples.
        groups: the m groups that are left out, one at a time.
        progress: shows how far it got.

    Returns:
        `(q, m)`, float64, in the unit of the loss.

    Raises:
        ValueError: there is no group, or one is empty, repeats an index, leaves nothing or reaches out of 0 to n − 1.
        FloatingPointError: a loss is not finite.
    """
    _check_groups(groups, n)
    before = _checked_losses(losses, retrain(list(range(n))))
    after = []
    for group in progress(groups, len(groups), "retraining"):
        removed = set(group)
        after.append(_checked_losses(losses, retrain([index for index in range(n) if index not in removed])))
    return torch.stack(after, dim=1) - before[:, None]


def group_scores(
    scores: Float[Tensor, "q n"], groups: Sequence[Sequence[int]], reweighted: bool = False
) -> Float[Tensor, "q m"]:
    """Return the predicted rise of each query's loss when each group is left out: the sum of its scores.

    Where the remaining samples keep their weight 1/n: Σ_{i in group} s[q, i]. Where retraining takes the mean over
    them, their weight is 1/(n − k), which weakens the weight decay relative to them: n/(n − k) Σ_{i in group}
    (s[q, i] − s̄[q]), s̄ the mean over all n training samples. It follows from −∇ of the decay being the mean gradient
    at the optimum.

    Args:
        scores: of all n training samples, in the unit of the loss.
        groups: the m groups.
        reweighted: whether retraining takes the mean over the remaining samples.

    Raises:
        ValueError: there is no group, or one is empty, repeats an index, leaves nothing or reaches out of 0 to n − 1.
    """
    n = scores.shape[1]
    _check_groups(groups, n)
    summed_scores = scores - scores.mean(1, keepdim=True) if reweighted else scores
    factors = [n / (n - len(group)) if reweighted else 1.0 for group in groups]
    pairs = zip(factors, groups, strict=True)
    return torch.stack([factor * summed_scores[:, list(group)].sum(1) for factor, group in pairs], dim=1)


def linear_datamodeling_score(
    scores: Float[Tensor, "q n"], masks: Bool[Tensor, "m n"], losses: Float[Tensor, "m q"]
) -> Float[Tensor, " q"]:
    """Return for each query how well sums of scores rank the losses after training on random subsets.

    LDS_q = Spearman over subsets of Σ_{i in subset} s[q, i] and −ℓ_q(trained on that subset). Its mean over queries is
    what is reported. Of scores without meaning it has a standard deviation of 1/√(m − 1) per query; noise of the
    training seeds lowers it, so average the losses over seeds.

    Reference: Park et al., TRAK: Attributing Model Behavior at Scale, 2023; Ilyas et al., Datamodels, 2022.

    Args:
        scores: positive is helpful.
        masks: which of the n training samples are in each of the m subsets.
        losses: each query's loss after training on each subset.

    Returns:
        `(q,)`, −1 to 1, float64; NaN for a query whose losses or sums are all equal.

    Raises:
        ValueError: the shapes do not fit, or there are fewer than 3 subsets.
        FloatingPointError: scores or losses are not finite.
    """
    expected = (len(masks), scores.shape[1]), (len(masks), len(scores))
    if masks.dtype is not torch.bool or (tuple(masks.shape), tuple(losses.shape)) != expected:
        raise ValueError(
            f"masks, losses: expected bool (m, {scores.shape[1]}) and (m, {len(scores)}) for scores"
            f" {tuple(scores.shape)}, got {masks.dtype} {tuple(masks.shape)} and {tuple(losses.shape)}"
        )
    predicted = masks.cpu().double() @ _finite(scores, "scores").cpu().double().T
    return _rank_agreement(predicted, losses)


class LinearDatamodelingScore(Metric):
    """Linear datamodeling score from batches of subsets, under DDP, too: the mean over queries of each one's Spearman.

    See `linear_datamodeling_score`. Each rank may bring its own subsets; the order does not matter.

    >>> metric = LinearDatamodelingScore()
    >>> metric.update(torch.tensor([[0.1], [0.3]]), torch.tensor([[2.0], [1.0]]))
    >>> metric.update(torch.tensor([[0.2]]), torch.tensor([[1.5]]))
    >>> round(metric.compute().item(), 6)
    1.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("predicted", [], dist_reduce_fx="cat")
        self.add_state("losses", [], dist_reduce_fx="cat")
        self.predicted: list[Tensor]
        self.losses: list[Tensor]

    def update(self, predicted: Float[Tensor, "m q"], losses: Float[Tensor, "m q"]) -> None:
        """Add subsets.

        Args:
            predicted: Σ of the scores of each subset's samples, for each query.
            losses: each query's loss after training on each subset.

        Raises:
            ValueError: the shapes differ, or another number of queries came before.
            FloatingPointError: values are not finite.
        """
        queries = self.predicted[0].shape[1] if self.predicted else predicted.shape[-1]
        if predicted.ndim != 2 or predicted.shape != losses.shape or predicted.shape[1] != queries:
            raise ValueError(
                f"predicted, losses: expected the same shape (m, {queries}),"
                f" got {tuple(predicted.shape)} and {tuple(losses.shape)}"
            )
        self.predicted.append(_finite(predicted, "predicted"))
        self.losses.append(_finite(losses, "losses"))

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean over queries; NaN if any query's losses or sums are all equal.

        Raises:
            ValueError: there are fewer than 3 subsets.
        """
        if len(self.predicted) == 0:
            raise ValueError(f"LinearDatamodelingScore: expected at least {FEWEST_PAIRS} subsets, got none")
        return _rank_agreement(dim_zero_cat(self.predicted), dim_zero_cat(self.losses)).mean()


def _rank_agreement(predicted: Tensor, losses: Tensor) -> Tensor:
    if len(losses) < FEWEST_PAIRS:
        raise ValueError(f"losses: expected at least {FEWEST_PAIRS} subsets, got {len(losses)}")
    sides = (_finite(predicted, "predicted"), -_finite(losses, "losses"))
    columns = zip(*(side.cpu().double().T for side in sides), strict=True)
    return torch.stack([_correlation(_ranks(a), _ranks(b)) for a, b in columns])


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    if bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return a.new_tensor(torch.nan)
    a, b = a - a.mean(), b - b.mean()
    return (a / a.norm()) @ (b / b.norm())


def _ranks(values: Tensor) -> Tensor:
    """Return each value's rank from 1; equal values share their mean rank."""
    _, rank_index, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[rank_index].double()


def _checked_losses(losses: Callable[[TrainedModel], Tensor], model: TrainedModel) -> Tensor:
    values = losses(model)
    if values.ndim != 1:
        raise ValueError(f"losses: expected one loss per query, shape (q,), got {tuple(values.shape)}")
    return _finite(values, "losses after retraining").cpu().double()


def _finite(values: Tensor, what: str) -> Tensor:
    if not bool(values.isfinite().all()):
        raise FloatingPointError(f"{what}: expected finite numbers, got NaN or infinity")
    return values.detach()


def _check_groups(groups: Sequence[Sequence[int]], n: int) -> None:
    if not len(groups):
        raise ValueError("groups: expected at least one, got none")
    for group in groups:
        distinct = len(set(group)) == len(group)
        if not 0 < len(group) < n or not distinct or min(group) < 0 or max(group) >= n:
            raise ValueError(f"groups: expected 1 to {n - 1} distinct indices from 0 to {n - 1}, got {list(group)}")
