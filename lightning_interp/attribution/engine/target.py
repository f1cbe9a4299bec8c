"""The target of an attribution, and the score of it that is explained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Target = Int[Tensor, " n"] | Callable[[Tensor], Tensor]
Score = Callable[[Tensor, Tensor], Tensor]


def logit(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the chosen class's logit; of a single logit z, z for class 1 and −z for class 0."""
    if logits.shape[1] == 1:
        return torch.where(labels > 0, logits[:, 0], -logits[:, 0])
    return logits.gather(1, labels[:, None])[:, 0]


def log_probability(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the logarithm of the chosen class's softmax probability; of a single logit, of its sigmoid."""
    if logits.shape[1] == 1:
        return F.logsigmoid(logit(logits, labels))
    return logit(logits.log_softmax(1), labels)


def probability(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the chosen class's softmax probability; of a single logit, its sigmoid."""
    return log_probability(logits, labels).exp()


def label_probability(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the chosen label's own sigmoid, for multi-label outputs."""
    return logit(logits, labels).sigmoid()


def select(outputs: Tensor, target: Target, score: Score = logit) -> Float[Tensor, " n"]:
    """Return one number per sample: the target class's score, or what a callable makes of the outputs.

    Outputs with positions `(n, classes, ...)` are averaged over them.

    Args:
        outputs: the model's, one row per sample.
        target: class per sample `(n,)` (of outputs with several labels or numbers: which of them), or a function from
            outputs to `(n,)`.
        score: `logit`, `probability`, `log_probability`, `label_probability`, or a function like them.

    Raises:
        ValueError: classes are missing or out of range, or a callable gave another shape than `(n,)`.
    """
    n = outputs.shape[0]
    if callable(target):
        scores = target(outputs)
        if scores.shape != (n,):
            raise ValueError(f"target: expected a function giving shape ({n},), got {tuple(scores.shape)}")
        return scores
    if target.shape != (n,) or target.is_floating_point():
        raise ValueError(f"target: expected {n} class indices, got {tuple(target.shape)} of {target.dtype}")
    logits = per_class(outputs)
    n_classes = max(2, logits.shape[1])  # a single logit has two classes
    if n and not 0 <= int(target.min()) <= int(target.max()) < n_classes:
        raise ValueError(f"target: expected classes 0 to {n_classes - 1}, got {target.tolist()}")
    # A copy, since a tensor made in inference mode cannot be saved for a backward.
    return score(logits, target.to(logits.device, torch.long, copy=True))


def per_class(outputs: Tensor) -> Float[Tensor, "n classes"]:
    """Return outputs as `(n, classes)`; the mean over positions, where they have some."""
    return outputs.reshape(len(outputs), -1) if outputs.ndim < 3 else outputs.flatten(2).mean(2)


def recorded(target: Target, n: int) -> Int[Tensor, " n"]:
    """Return the target classes for the record; −1 where a callable chose."""
    return torch.full((n,), -1) if callable(target) else target.detach().cpu().long()


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
