"""Results of attribution: explanations, and a run's maps at one moment of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor

Ranking = Literal["value", "size"]


@dataclass(frozen=True, eq=False)
class Explanation:
    """Attribution maps of a batch of samples by one method.

    Args:
        method: tag of the attributor.
        maps: one map per sample: `(n, ...)` in the shape of the input for gradients (signed), `(n, H, W)` for
            class activation maps, `(n, tokens)` for token ids.
        target: class per sample that the map explains, `(n,)`.
        layer: the layer whose activations the map is made of; None where the input is differentiated or perturbed.
        facts: diagnostics of each map, name → `(n,)`: `completeness_gap` of integrated gradients, `r2` of LIME.
        ranked_by: which positions count as the most important: "value", those with the largest numbers, as of maps in
            the score's unit, where negative numbers are evidence against the target; "size", those with the largest
            absolute values, as of a gradient, whose sign gives the direction of a change and not its importance.

    Raises:
        ValueError: `ranked_by` is neither.
    """

    method: str
    maps: Float[Tensor, "n *shape"]
    target: Int[Tensor, " n"]
    layer: str | None = None
    facts: Mapping[str, Float[Tensor, " n"]] = field(default_factory=dict)
    ranked_by: Ranking = "value"

    def __post_init__(self) -> None:
        if self.ranked_by not in get_args(Ranking):
            raise ValueError(f'Explanation(ranked_by=...): expected "value" or "size", got {self.ranked_by!r}')


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
