"""The number per sample that a backward starts from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lightning_interp.attribution.engine.target import Score, Target, logit, select


class Goal(ABC):
    """What is differentiated: one number per sample, of the outputs or of what layers give.

    Goals are hashable: methods of equal goals share a backward.

    Args:
        layers: names of the layers whose outputs it reads.
    """

    layers: tuple[str, ...]

    @abstractmethod
    def __call__(
        self, outputs: Tensor, activations: Mapping[str, Float[Tensor, "n c *positions"]], target: Target
    ) -> Float[Tensor, " n"]:
        """Return the number to differentiate."""


@dataclass(frozen=True)
class OfTarget(Goal):
    """The target's score.

    Args:
        score: `logit`, `probability`, `log_probability`, or a function like them.
        layers: none.
    """

    score: Score = logit
    layers: tuple[str, ...] = ()

    def __call__(
        self, outputs: Tensor, activations: Mapping[str, Float[Tensor, "n c *positions"]], target: Target
    ) -> Float[Tensor, " n"]:
        """Return the score of each sample."""
        return select(outputs, target, self.score)
