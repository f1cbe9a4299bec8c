"""Gradients through changed ReLUs: DeconvNet and guided backpropagation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_interp.attribution.cam import check_layer
from lightning_interp.attribution.engine.forward_backward import INPUT, PassResult, check_layers
from lightning_interp.attribution.engine.last_map import positions_of
from lightning_interp.attribution.engine.relu_rules import DECONVNET, GUIDED, ReluRule
from lightning_interp.attribution.engine.single_pass import SinglePass
from lightning_interp.attribution.engine.target import Goal, OfTarget, Target
from lightning_interp.attribution.results import Ranking
from lightning_interp.attribution.saliency import of_input
from lightning_interp.data.batch import count_samples, tensors
from lightning_interp.data.task import Task
from lightning_interp.network.undisturbed import hooked, undisturbed


@dataclass(frozen=True)
class DeconvNet(SinglePass):
    """DeconvNet: a feature projected back to the input through ReLUs that pass positive signals alone.

    Max pooling goes back to where its maximum was, convolutions by their transposed filters, and each ReLU passes
    ReLU(signal), independent of its own input. Signed, in the shape of the input. Without a layer the target's logit is
    projected. With one, the strongest activation of a channel: all others of the layer are set to zero, as in the
    paper, and what comes out is the pattern of the input that excites it. It looks much the same for any class: it
    shows what a feature is, not why the network chose a class.

    Reference: Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, 2014.

    Args:
        layer: name of the layer whose feature map is projected; the target is then ignored.
        channel: which of its channels; each sample's own strongest when None.
    """

    layer: str | None = None
    channel: int | None = None

    def __post_init__(self) -> None:
        check_layer("DeconvNet", self.layer)
        if self.channel is not None and self.layer is None:
            raise ValueError(f"DeconvNet(channel={self.channel}): expected layer= with it, got None")

    @property
    def name(self) -> str:
        """Tag of the method."""
        words = ["DeconvNet", self.layer, None if self.channel is None else str(self.channel)]
        return "_".join(word for word in words if word is not None)

    @property
    def goal(self) -> Goal:
        """What is projected: the target's logit, or the layer's strongest activation."""
        return OfTarget() if self.layer is None else Strongest((self.layer,), self.channel)

    @property
    def rule(self) -> ReluRule:
        """Positive signals pass."""
        return DECONVNET

    @property
    def at(self) -> str:
        """Where: at the input."""
        return INPUT

    @property
    def ranked_by(self) -> Ranking:
        """By size: a gradient's sign is a direction, not an importance."""
        return "size"

    def read(self, result: PassResult, layer: str) -> Tensor:
        """Return what arrives at the input; of tokens its norm."""
        return _arrived(result)


@dataclass(frozen=True)
class GuidedBackprop(SinglePass):
    """Guided backpropagation: the gradient of the target's logit, of which each ReLU passes the positive part alone.

    A ReLU passes a gradient where its own input was positive and the gradient is, too. Signed, in the shape of the
    input. Sharp pictures that hardly change when the network's upper layers are reinitialised: it recovers the image's
    edges rather than what the network has learned (Adebayo et al. 2018), so do not read an explanation into it.

    Reference: Springenberg et al., Striving for Simplicity: The All Convolutional Net, 2015.
    """

    @property
    def name(self) -> str:
        """Tag of the method."""
        return "GuidedBackprop"

    @property
    def goal(self) -> Goal:
        """What is projected: the target's logit."""
        return OfTarget()

    @property
    def rule(self) -> ReluRule:
        """Positive gradients pass where the input did."""
        return GUIDED

    @property
    def at(self) -> str:
        """Where: at the input."""
        return INPUT

    @property
    def ranked_by(self) -> Ranking:
        """By size: a gradient's sign is a direction, not an importance."""
        return "size"

    def read(self, result: PassResult, layer: str) -> Tensor:
        """Return what arrives at the input; of tokens its norm."""
        return _arrived(result)


@dataclass(frozen=True)
class Strongest(Goal):
    """The strongest activation of a channel over positions; half its square, so that its gradient is itself."""

    layers: tuple[str, ...]
    channel: int | None

    def __call__(self, outputs: Tensor, layers: Mapping[str, Tensor], target: Target) -> Float[Tensor, " n"]:
        """Return one number per sample."""
        activations = layers[self.layers[0]]
        return strongest_of(activations, self.channel, self.layers[0]).square() / 2


class StrongestImage(NamedTuple):
    """The samples that excite a channel most.

    Args:
        indices: place of each in the order of the batches, the strongest first, `(k,)`.
        activations: the channel's largest activation in each, `(k,)`.
    """

    indices: Int[Tensor, " k"]
    activations: Float[Tensor, " k"]


def strongest(
    model: nn.Module, batches: Iterable[Any], layer: str, channel: int, k: int = 9, task: Task = Task()
) -> StrongestImage:
    """Return the samples in which a channel of a layer is most active somewhere, to be projected by `DeconvNet`.

    Args:
        model: any module; it runs in eval mode.
        batches: as `task.inputs` reads them, on the model's device.
        layer: name of the layer.
        channel: which of its channels.
        k: how many samples; fewer where there are fewer.
        task: how to read a batch and call the model.

    Raises:
        ValueError: the layer is unknown or was not called, or has no such channel.
    """
    check_layers(model, [layer])
    batch_maxima: list[Tensor] = []
    n = 0

    def hook(name: str, module: nn.Module, _: Any, output: Any) -> None:
        activations = next(tensors(output))
        maxima = strongest_of(positions_of(name, module, activations, n), channel, name)
        batch_maxima.append(maxima.detach().float().cpu())

    with undisturbed(model), torch.no_grad(), hooked(model, [layer], hook):
        for batch in batches:
            inputs = task.inputs(batch)
            n = count_samples(inputs)
            task.outputs(model, inputs)
    if not batch_maxima:
        raise ValueError(f"layer={layer!r}: expected a layer that forward calls, but it was not called")
    best = torch.cat(batch_maxima).topk(min(k, sum(map(len, batch_maxima))))
    return StrongestImage(best.indices, best.values)


def strongest_of(activations: Float[Tensor, "n c *at"], channel: int | None, layer: str) -> Float[Tensor, " n"]:
    """Return each sample's largest activation of a channel, or of all."""
    if channel is not None and not 0 <= channel < activations.shape[1]:
        raise ValueError(f"channel: expected 0 to {activations.shape[1] - 1} at {layer!r}, got {channel}")
    channels = activations if channel is None else activations[:, channel : channel + 1]
    return channels.flatten(1).max(1).values


def _arrived(result: PassResult) -> Tensor:
    gradient = of_input(result.gradient)
    return gradient.norm(dim=-1) if result.explained.tokens else gradient
