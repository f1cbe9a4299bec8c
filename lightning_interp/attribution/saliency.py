"""Gradients with respect to the input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_interp.attribution.engine.forward_backward import INPUT, PassResult
from lightning_interp.attribution.engine.single_pass import SinglePass
from lightning_interp.attribution.engine.target import OfTarget, Score, logit
from lightning_interp.attribution.results import Ranking


@dataclass(frozen=True)
class InputMap(SinglePass):
    """A map that the gradient of the target's score at the input makes; abstract.

    Args:
        score: what is differentiated: `logit`, `probability`, `log_probability`, or a function like them.
    """

    score: Score = logit

    @property
    def name(self) -> str:
        """Tag of the method."""
        return type(self).__name__ + suffix(self.score)

    @property
    def goal(self) -> OfTarget:
        """What is differentiated: the target's score."""
        return OfTarget(self.score)

    @property
    def at(self) -> str:
        """Where: at the input."""
        return INPUT


@dataclass(frozen=True)
class Saliency(InputMap):
    """Gradient of the target's logit with respect to the input.

    map = ∂ logit_target / ∂x, signed, in the shape of x; shown as the largest absolute value over channels. For
    token ids, the norm over the embedding's dimensions of the gradient at the output of the embedding that they index,
    `(n, tokens)`. It shows where a small change would move the logit, not what the logit is made of, and is noisy where
    the network has many ReLUs. The gradient of the probability is another quantity: p_t times the logit's gradient less
    its mean over classes, weighted by their probabilities.

    Reference: Simonyan et al., Deep Inside Convolutional Networks, 2013.

    Args:
        score: what is differentiated: `logit`, `probability`, `log_probability`, or a function like them.

    >>> import torch
    >>> net = torch.nn.Linear(3, 2, bias=False)
    >>> maps = Saliency()(net, torch.ones(1, 3), torch.tensor([1])).maps
    >>> bool(torch.equal(maps[0], net.weight.detach()[1]))
    True
    """

    @property
    def ranked_by(self) -> Ranking:
        """By size: a gradient's sign is a direction, not an importance."""
        return "size"

    def read(self, result: PassResult, layer: str) -> Tensor:
        """Return the gradient; of tokens its norm."""
        gradient = of_input(result.gradient)
        return gradient.norm(dim=-1) if result.explained.tokens else gradient


@dataclass(frozen=True)
class InputXGradient(InputMap):
    """Input times gradient: what each input adds to the logit if the network is taken as linear around it.

    map = x ⊙ ∂ logit_target / ∂x, signed, in the shape of x; for token ids the sum of it over the embedding's
    dimensions, `(n, tokens)`. Where x = 0 it is 0, even if the network uses that value: it depends on how inputs are
    normalised.

    Reference: Shrikumar et al., Not Just a Black Box, 2016.

    Args:
        score: what is differentiated: `logit`, `probability`, `log_probability`, or a function like them.
    """

    def read(self, result: PassResult, layer: str) -> Tensor:
        """Return the product; of tokens its sum over dimensions."""
        product = of_input(result.values) * of_input(result.gradient)
        return product.sum(-1) if result.explained.tokens else product


def suffix(score: Score, default: Score = logit) -> str:
    """Return what a tag gets where the score is not the method's default."""
    return "" if score is default else f"_of_{getattr(score, '__name__', repr(score))}"


def of_input(tensor: Tensor | None) -> Tensor:
    """Return a tensor of the input's gradient, which the pass was run with.

    Raises:
        RuntimeError: it was run without.
    """
    if tensor is None:
        raise RuntimeError("the pass was run without a gradient of the input")
    return tensor
