"""What flows between the rooms: frozen records with named fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lightning_interp.representation import Representation

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All layers' representations of one probe at one moment of training.

    Args:
        epoch: number of finished epochs; 0 before the first step.
        step: optimizer steps taken (`trainer.global_step`).
        layers: layer → representation, in call order.
    """

    epoch: int
    step: int
    layers: Mapping[str, Representation]


class Caution(NamedTuple):
    """Why not to trust a measure on a layer.

    Args:
        reason: in words.
        detail: the layer's own number behind it.
    """

    reason: str
    detail: str


class Doubt(NamedTuple):
    """A similarity, and how far to trust it.

    Args:
        value: the similarity itself.
        chance: what it would be with the samples of one side shuffled; NaN where it is not known.
        standard_error: how much it varies with the choice of samples; NaN where it is not known.
        caution: why not to trust it; None where nothing is known.
    """

    value: float
    chance: float
    standard_error: float
    caution: Caution | None


@dataclass(frozen=True, eq=False)
class SimilarityMap:
    """A table of similarities with names on both sides, as shown in a heat map.

    Args:
        measure: tag of the measure.
        title: what is compared with what.
        rows: names of the rows.
        columns: names of the columns.
        values: `(rows, columns)`; NaN where the measure cannot be trusted at all.
        row_title: what the rows are.
        column_title: what the columns are.
        n: number of samples compared.
        note: when not to trust it, in words; empty where nothing is known.
        distance: whether 0 means the same, as for an angle, instead of 1.
        chance: what each value would be with one side's samples shuffled, `(rows, columns)`; NaN where not known.
        standard_error: how much each varies with the choice of samples, `(rows, columns)`; NaN where not known.
        legend: what 0 and 1 mean, where they do not mean unrelated and the same.
        own_scale: whether the values are on a scale of the user's own, of which nothing is known.
    """

    measure: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Float[Tensor, "rows columns"]
    row_title: str
    column_title: str
    n: int
    note: str = ""
    distance: bool = False
    chance: Float[Tensor, "rows columns"] | None = None
    standard_error: Float[Tensor, "rows columns"] | None = None
    legend: str = ""
    own_scale: bool = False


@dataclass(frozen=True, eq=False)
class Explanation:
    """Attribution maps of a batch of samples by one method.

    Args:
        method: tag of the attributor.
        maps: one map per sample: `(n, ...)` in the shape of the input for gradients (signed), `(n, H, W)` for
            class activation maps, `(n, tokens)` for token ids.
        target: class per sample that the map explains, `(n,)`.
        layer: the layer that the method looked at; None where it is the input.
        facts: what the method says of each map, name → `(n,)`: `completeness_gap` of integrated gradients, `r2` of
            LIME.
    """

    method: str
    maps: Float[Tensor, "n *shape"]
    target: Int[Tensor, " n"]
    layer: str | None = None
    facts: Mapping[str, Float[Tensor, " n"]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class MapSnapshot:
    """Attribution maps of the same samples, for the same targets, at one moment of training.

    Args:
        epoch: number of finished epochs; 0 before the first step.
        step: optimizer steps taken (`trainer.global_step`).
        maps: method → maps, `(n, H, W)`, `(n, tokens)` or `(n, columns)`.
    """

    epoch: int
    step: int
    maps: Mapping[str, Float[Tensor, "n *shape"]]


@dataclass(frozen=True, eq=False)
class Shown:
    """One sample as a reader sees it: what it is, and what the network says about it.

    Args:
        id: name of the sample (dataset index unless the user named it otherwise).
        value: the network's input, one sample, on the CPU.
        label: true class (or value) in words; empty if unknown.
        prediction: predicted class in words; empty if not asked.
        probability: of the predicted class; NaN if unknown.
        wrong: whether the prediction is known to differ from the label.
        likeliest: the most probable classes in words, each with its probability, the first first.
    """

    id: str
    value: Any
    label: str = ""
    prediction: str = ""
    probability: float = float("nan")
    wrong: bool = False
    likeliest: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Influence:
    """Influence of training samples on queries. Positive is helpful.

    `scores[q, i]` is the predicted rise of query q's loss when training sample i is left out and the others
    keep their weight 1/n.

    Args:
        scores: `(q, n)`, in the unit of the loss.
        train_ids: dataset index of each column, `(n,)`.
        train_targets: target of each training sample, `(n, ...)`.
        query_targets: target of each query, `(q, ...)`.
        query_losses: loss of each query, `(q,)`.
        method: the estimator and its curvature in words.
        damping: the total λ that was added to the curvature, weight decay included.
        covered: parameters whose gradients entered the scores.
        left_out: trainable parameters that did not enter, with their number of elements.
        covered_elements: number of elements of the covered parameters.
        gradient_norm: norm of the mean training gradient over the covered parameters: 0 at an optimum.
        curvature_n: number of training samples that the curvature was estimated from.
        notes: what a reader must know before trusting the scores.
        unit: the scores' unit.
    """

    scores: Float[Tensor, "q n"]
    train_ids: Int[Tensor, " n"]
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
        same = self.train_targets[None, :] == self.query_targets[:, None]
        others = int((~same).sum(1).min()) if same.numel() else 0
        if others < k:
            raise ValueError(f"surprising: expected k at most {others}, got {k}")
        return self._top(self.scores.masked_fill(same, -torch.inf), k)

    def _top(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if not 0 <= k <= scores.shape[1]:
            raise ValueError(f"k: expected 0 to {scores.shape[1]} (the training samples), got {k}")
        top = scores.topk(k, dim=1)
        return self.train_ids[top.indices], top.values
