"""The interface of attribution methods: a callable, and optional members."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_interp.attribution.results import Explanation
from lightning_interp.checks import tag
from lightning_interp.data.task import Task

# Any callable `(model, inputs, target, task) -> Explanation`, with no base class. Each protocol below is optional: a
# method that has its members is used in that way, and needs no base class for it.
Attributor = Callable[..., Explanation]


@runtime_checkable
class RanksPositions(Protocol):
    """An attributor with its own measure of how important each position of its maps is."""

    def importance(self, maps: Float[Tensor, "n *shape"]) -> Float[Tensor, "n *shape"]:
        """Return the numbers by which deletion and insertion order positions, the largest first."""


@runtime_checkable
class ClassExplanations(Protocol):
    """Explanations of every class of a batch, such as `LocalModels`."""

    def of(self, target: Int[Tensor, " n"]) -> Explanation:
        """Return the explanation of one class per sample."""


@runtime_checkable
class ExplainsAllClasses(Protocol):
    """An attributor to which all classes cost as much as one: they are then explained together."""

    def all_classes(self, model: nn.Module, inputs: Any, task: Task) -> ClassExplanations:
        """Explain every class of each sample of a batch."""


def importance(method: object, explanation: Explanation) -> Float[Tensor, "n *shape"]:
    """Return how important each position is, by the method's own `importance` or the explanation's `ranked_by`.

    A wrapper that returns another method's explanation, or a copy made by `dataclasses.replace`, is thus ranked like
    that method.

    Args:
        method: the attributor.
        explanation: what it returned.

    Raises:
        TypeError: the method's `importance` gave no tensor of the maps' shape.
    """
    if isinstance(method, RanksPositions):
        ranks = method.importance(explanation.maps)
        if not isinstance(ranks, Tensor) or ranks.shape != explanation.maps.shape:
            shown = f"shape {tuple(ranks.shape)}" if isinstance(ranks, Tensor) else repr(ranks)
            raise TypeError(
                f"{tag(method)}.importance: expected a tensor of shape {tuple(explanation.maps.shape)}, got {shown}"
            )
        return ranks
    return explanation.maps.abs() if explanation.ranked_by == "size" else explanation.maps
