"""Results of influence: scores of training samples, and their checks by retraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Influence:
    """Influence of training samples on queries. Positive is helpful.

    `scores[q, i]` is the predicted rise of query q's loss when training sample i is left out and all other samples keep
    their weight 1/n.

    Args:
        scores: `(q, m)`, in the unit of the loss; a column for each scored training sample, or, with `top_k`, for each
            sample that is among any query's strongest.
        train_ids: dataset index of each column, `(m,)`.
        train_targets: target of each column's sample, `(m, ...)`.
        query_targets: target of each query, `(q, ...)`.
        query_losses: loss of each query, `(q,)`.
        method: the estimator and its curvature, in words.
        damping: the total λ that was added to the curvature, weight decay included; the median where parameters
            differ; NaN where there is none.
        covered: parameters whose gradients entered the scores.
        left_out: trainable parameters that did not enter, with their number of elements.
        covered_elements: number of elements of the covered parameters.
        gradient_norm: norm of the mean training gradient over the covered parameters: 0 at an optimum.
        curvature_n: number of training samples that the curvature was estimated from.
        notes: on how the scores were computed, for the report.
        unit: the scores' unit; "none" where only their order means something.
        places: index of each column's sample in the training set that was read, `(m,)`; 0 to m − 1 when None.
        scored: number of training samples scored; the number of columns when None.
        mean: mean score of each query over all scored samples, `(q,)`; over the columns when None.
        agreement: another setting, in words → share of each query's strongest samples that are among the strongest
            with it too, mean over queries.
        duplicates: row of a query → dataset indices of training samples whose input is identical, bit for bit.
        doubts: reasons for caution that do not depend on the scores, such as another loss than the trained one.
    """

    scores: Float[Tensor, "q m"]
    train_ids: Int[Tensor, " m"]
    train_targets: Tensor
    query_targets: Tensor
    query_losses: Float[Tensor, " q"]
    method: str
    damping: float
    covered: tuple[str, ...]
    left_out: Mapping[str, int]
    covered_elements: int
    gradient_norm: float
    curvature_n: int
    notes: tuple[str, ...] = field(default=())
    unit: str = "loss"
    places: Int[Tensor, " m"] | None = None
    scored: int | None = None
    mean: Float[Tensor, " q"] | None = None
    agreement: Mapping[str, float] = field(default_factory=dict)
    duplicates: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()

    @property
    def n_scored(self) -> int:
        """Number of training samples scored."""
        return self.scores.shape[1] if self.scored is None else self.scored

    @property
    def columns(self) -> Int[Tensor, " m"]:
        """Index of each column's sample in the training set that was read."""
        return torch.arange(self.scores.shape[1]) if self.places is None else self.places

    def centred(self) -> Float[Tensor, "q m"]:
        """Return the scores minus each query's mean, for retraining with a mean over n − 1 samples and weight decay."""
        mean = self.scores.mean(1) if self.mean is None else self.mean
        return self.scores - mean[:, None]

    def group(self, ids: Sequence[int]) -> Float[Tensor, " q"]:
        """Return the predicted rise of each query's loss when all these samples are left out: the sum of their scores.

        Args:
            ids: dataset indices.

        Raises:
            ValueError: one of them has no score here.
        """
        columns = {int(train_id): column for column, train_id in enumerate(self.train_ids)}
        if missing := [index for index in ids if index not in columns]:
            raise ValueError(f"ids: expected scored training samples, got {', '.join(map(str, missing[:8]))} besides")
        return self.scores[:, [columns[index] for index in ids]].sum(1)

    @property
    def coverage(self) -> float:
        """Share of the trainable parameters' elements that entered the scores."""
        return self.covered_elements / max(1, self.covered_elements + sum(self.left_out.values()))

    def helpful(self, k: int) -> tuple[Int[Tensor, "q k"], Float[Tensor, "q k"]]:
        """Return dataset indices and scores of each query's `k` most helpful samples, best first."""
        return self._top(self.scores, k)

    def harmful(self, k: int) -> tuple[Int[Tensor, "q k"], Float[Tensor, "q k"]]:
        """Return dataset indices and scores of each query's `k` most harmful samples, worst first."""
        indices, scores = self._top(-self.scores, k)
        return indices, -scores

    def surprising(self, k: int) -> tuple[Int[Tensor, "q k"], Float[Tensor, "q k"]]:
        """Return indices and scores of the `k` most helpful samples of another class than the query's.

        Raises:
            ValueError: targets are not one class per sample, or fewer than `k` are of another class.
        """
        if self.train_targets.ndim != 1 or self.train_targets.is_floating_point():
            raise ValueError("surprising: expected one class index per training sample")
        same_class = self.train_targets[None, :] == self.query_targets[:, None]
        available = int((~same_class).sum(1).min()) if same_class.numel() else 0
        if available < k:
            raise ValueError(f"surprising: expected k at most {available}, got {k}")
        return self._top(self.scores.masked_fill(same_class, -torch.inf), k)

    def _top(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if not 0 <= k <= scores.shape[1]:
            raise ValueError(f"k: expected 0 to {scores.shape[1]} (the training samples), got {k}")
        top = scores.topk(k, dim=1)
        return self.train_ids[top.indices], top.values


class SpotCheck(NamedTuple):
    """A score that retraining has checked.

    Args:
        query: dataset index of the query.
        train_index: dataset index of the sample that was left out.
        predicted: its score.
        actual: by how much the query's loss rose without it.
        whole: whether all of the network was retrained, or its last layer alone.
    """

    query: int
    train_index: int
    predicted: float
    actual: float
    whole: bool = True


@dataclass(frozen=True, eq=False)
class SelfInfluence:
    """By how much each training sample's own loss would rise if it were left out.

    It is large where no other sample supports the label.

    Args:
        scores: `(n,)`, in the unit of the loss.
        ids: dataset index of each sample, `(n,)`.
        targets: its label, `(n, ...)`.
        losses: its loss, `(n,)`.
        suggested: the class that the network predicts, `(n,)`; None where there are no classes.
        chance: the probability that the network gives to the label, `(n,)`; NaN where there are no classes.
    """

    scores: Float[Tensor, " n"]
    ids: Int[Tensor, " n"]
    targets: Tensor
    losses: Float[Tensor, " n"]
    suggested: Int[Tensor, " n"] | None
    chance: Float[Tensor, " n"]

    def first(self, k: int) -> Int[Tensor, " k"]:
        """Return the positions of the `k` samples to inspect first, those with the largest self-influence."""
        return self.scores.topk(min(k, len(self.scores))).indices
