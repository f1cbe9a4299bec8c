"""Results of similarity: snapshots, maps of similarities, and how far to trust each value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from lightning_interp.similarity.representation import Representation


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
    """A reason not to trust a measure on a layer.

    Args:
        reason: in words.
        detail: the layer's own number behind it.
    """

    reason: str
    detail: str


class Reliability(NamedTuple):
    """A similarity, and how far to trust it.

    Args:
        value: the similarity itself.
        chance: what it would be with the samples of one side shuffled; NaN where it is not known.
        standard_error: how much it varies with the choice of samples; NaN where it is not known.
        caution: the reason for caution; None where there is none.
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
        note: reasons for caution, in words; empty where there are none.
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
