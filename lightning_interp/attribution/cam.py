"""Class activation maps: of pooled linear networks (CAM), and by gradients (Grad-CAM, Grad-CAM++, HiResCAM)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_interp.attribution.engine.explained_input import ExplainedInput
from lightning_interp.attribution.engine.forward_backward import (
    LAST_MAP,
    LayerGradients,
    PassResult,
    forward_backward,
    known_target,
)
from lightning_interp.attribution.engine.last_map import at_inputs_size
from lightning_interp.attribution.engine.single_pass import SinglePass
from lightning_interp.attribution.engine.target import OfTarget, Score, Target, logit, per_class
from lightning_interp.attribution.saliency import suffix
from lightning_interp.data.batch import at_least_float32
from lightning_interp.data.task import Task
from lightning_interp.network.undisturbed import explaining

LOGIT_TOLERANCE = 1e-3  # of the largest logit: far above the rounding of float32; any other head differs by more


@dataclass(frozen=True)
class GradientMap(SinglePass):
    """A class activation map that a layer's activations and gradients make; abstract.

    Args:
        layer: name of the layer, as in `named_modules`; when None, the last one in the forward that gives a map or
            tokens of which more than one position has a gradient.
        score: what is differentiated: `logit`, `probability`, `log_probability`, or a function like them.
    """

    layer: str | None = None
    score: Score = logit

    def __post_init__(self) -> None:
        check_layer(type(self).__name__, self.layer)

    @property
    def name(self) -> str:
        """Tag of the method."""
        return tagged(type(self).__name__, self.layer) + suffix(self.score)

    @property
    def goal(self) -> OfTarget:
        """What is differentiated: the target's score."""
        return OfTarget(self.score)

    @property
    def at(self) -> str:
        """Where: at the layer."""
        return self.layer or LAST_MAP

    @abstractmethod
    def combined(self, activations: Float[Tensor, "n c *at"], gradients: Float[Tensor, "n c *at"]) -> Tensor:
        """Return the map before its ReLU, `(n, *at)`."""

    def read(self, result: PassResult, layer: str) -> Tensor:
        """Return the map after its ReLU, at the input's size."""
        activations, gradients = with_positions(result.layers[layer], layer)
        combined = at_least_float32(self.combined(activations, gradients))
        return at_inputs_size(combined.relu(), result.explained.raw, layer)


@dataclass(frozen=True)
class GradCAM(GradientMap):
    """Gradient-weighted class activation map of a layer.

    map = ReLU(Σ_k w_k A_k), w_k the mean over positions of ∂ logit_target / ∂A_k, A the layer's output: feature
    maps, or tokens. Upsampled bilinearly to the input's size; `(n, H, W)` for images, `(n, tokens)` for text. No
    gradient is computed below the layer. The map is as coarse as the layer: a 1 × 1 output has no positions to show. A
    map of zeros means that no position is evidence for the target.

    Reference: Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization,
    2017.

    Args:
        layer: name of the layer, as in `named_modules`; when None, the last one in the forward that gives a map or
            tokens of which more than one position has a gradient.
        score: what is differentiated: `logit`, `probability`, `log_probability`, or a function like them.
    """

    def combined(self, activations: Float[Tensor, "n c *at"], gradients: Float[Tensor, "n c *at"]) -> Tensor:
        """Return Σ_k w_k A_k, `(n, *at)`."""
        return grad_cam(activations, gradients)


@dataclass(frozen=True)
class GradCAMPlusPlus(GradientMap):
    """Grad-CAM++: Grad-CAM with gradients weighted by position, so that several objects of a class all show.

    map = ReLU(Σ_k w_k A_k), w_k = Σ_positions α ReLU(g), g = ∂ logit_target / ∂A_k and α = 1 / (2 + g Σ_positions A_k):
    the weights that the paper derives from second and third derivatives of exp(logit), where ReLU is the only
    nonlinearity above the layer. Meant for feature maps after a ReLU; where Σ A is negative, α can grow without bound.

    Reference: Chattopadhay et al., Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks, 2018.

    Args:
        layer: as of `GradCAM`.
        score: what is differentiated.
    """

    def combined(self, activations: Float[Tensor, "n c *at"], gradients: Float[Tensor, "n c *at"]) -> Tensor:
        """Return Σ_k w_k A_k, `(n, *at)`."""
        return grad_cam_plus_plus(activations, gradients)


@dataclass(frozen=True)
class HiResCAM(GradientMap):
    """Activation times gradient at each position: Grad-CAM without the mean over positions.

    map = ReLU(Σ_k A_k ⊙ ∂ logit_target / ∂A_k). Equal to Grad-CAM where all positions have the same gradient, as
    under global average pooling; elsewhere it shows the positions that were used, where Grad-CAM's mean spreads one
    position's gradient over all. Preferable for transformers, whose tokens have very
    different gradients.

    Reference: Draelos and Carin, Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural
    networks, 2020.

    Args:
        layer: as of `GradCAM`.
        score: what is differentiated.
    """

    def combined(self, activations: Float[Tensor, "n c *at"], gradients: Float[Tensor, "n c *at"]) -> Tensor:
        """Return Σ_k A_k ⊙ ∂s/∂A_k, `(n, *at)`."""
        return (activations * gradients).sum(1)


@dataclass(frozen=True)
class CAM(SinglePass):
    """Class activation map of a network that ends in global average pooling and one linear layer.

    map = Σ_k w_k^c A_k, A the last feature maps and w^c the linear layer's weights for the target class; signed, no
    ReLU; upsampled bilinearly to the input's size, `(n, H, W)`. Its mean over positions, with the bias, is the logit.
    Equal to Grad-CAM before its ReLU up to the factor H · W.

    Reference: Zhou et al., Learning Deep Features for Discriminative Localization, 2016.

    Args:
        layer: name of the layer that gives A; when None, the last one in the forward that gives a map.
    """

    layer: str | None = None

    def __post_init__(self) -> None:
        check_layer("CAM", self.layer)

    @property
    def name(self) -> str:
        """Tag of the method."""
        return tagged("CAM", self.layer)

    @property
    def goal(self) -> OfTarget:
        """What is differentiated: the logit."""
        return OfTarget()

    @property
    def at(self) -> str:
        """Where: at the layer."""
        return self.layer or LAST_MAP

    def read(self, result: PassResult, layer: str) -> Tensor:
        """Return the signed map at the input's size.

        Raises:
            ValueError: the outputs are no linear function of the map's mean over positions.
        """
        activations, gradients = with_positions(result.layers[layer], layer)
        if not _pooled_and_linear(result.explained.model, activations, result.outputs):
            raise ValueError(
                f"CAM(layer={layer!r}): expected a network whose outputs are one linear layer (or nothing) of this"
                f" layer's mean over positions, got one that ends otherwise; use GradCAM()"
            )
        summed = gradients.flatten(2).sum(2)  # of such a network, the linear layer's weights for the target
        return at_inputs_size(at_least_float32(weighted_sum(activations, summed)), result.explained.raw, layer)


def grad_cam(activations: Float[Tensor, "n c *at"], gradients: Float[Tensor, "n c *at"]) -> Float[Tensor, "n *at"]:
    """Return the map before its ReLU: Σ_k A_k · mean over positions of ∂s/∂A_k."""
    return weighted_sum(activations, gradients.flatten(2).mean(2))


def grad_cam_plus_plus(
    activations: Float[Tensor, "n c *at"], gradients: Float[Tensor, "n c *at"]
) -> Float[Tensor, "n *at"]:
    """Return the map before its ReLU: Σ_k A_k · Σ_positions α ReLU(g)."""
    g, total = gradients.flatten(2), activations.flatten(2).sum(2, keepdim=True)
    weights = torch.where(g <= 0, torch.zeros_like(g), g / (2 + g * total))  # so NaN stays NaN
    return weighted_sum(activations, weights.sum(2))


def weighted_sum(activations: Float[Tensor, "n c *at"], weights: Float[Tensor, "n c"]) -> Float[Tensor, "n *at"]:
    """Return the sum of a layer's channels, each times its weight."""
    return torch.einsum("nc,nc...->n...", weights, activations)


def with_positions(layer_gradients: LayerGradients, layer: str) -> LayerGradients:
    """Return a layer's activations and gradients unchanged, where they have positions.

    Raises:
        ValueError: they have no positions.
    """
    if layer_gradients.activations.ndim < 3:
        shape = tuple(layer_gradients.activations.shape)
        raise ValueError(f"layer={layer!r}: expected an output (n, channels, H, W) or (n, tokens, d), got {shape}")
    return layer_gradients


def _pooled_and_linear(model: nn.Module, activations: Tensor, outputs: Tensor) -> bool:
    """Return whether the outputs are one linear layer (or nothing) of the activations' mean over positions."""
    pooled, logits = activations.flatten(2).mean(2), per_class(outputs)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    heads = [layer for layer in linear if layer.in_features == pooled.shape[1]]
    candidates = [F.linear(pooled.to(head.weight), head.weight, head.bias) for head in heads] + [pooled]
    scale = logits.abs().max().clamp(min=1e-12)
    # "Not above" rather than "below": a network with NaN outputs is judged by shape alone, and its map is NaN.
    return any(
        candidate.shape == logits.shape and not bool(((candidate - logits).abs() > LOGIT_TOLERANCE * scale).any())
        for candidate in candidates
    )


def check_layer(owner: str, layer: object) -> None:
    """Raise a TypeError unless a layer is a name or None."""
    if layer is not None and not isinstance(layer, str):
        raise TypeError(f"{owner}(layer=...): expected a layer's name or None, got {layer!r}")


def tagged(method: str, layer: str | None) -> str:
    """Return a method's tag, with the layer where one was named."""
    return method if layer is None else f"{method}_{layer}"


def last_map_layer(model: nn.Module, inputs: object, target: Target, task: Task = Task()) -> str:
    """Return the name of the layer that class activation maps take where none is named.

    Raises:
        ValueError: no layer gives a map or tokens.
    """
    with explaining(model):
        explained = ExplainedInput(model, inputs, task)
        return forward_backward(explained, known_target(target), OfTarget(), layers=[LAST_MAP], of_input=False).last_map
