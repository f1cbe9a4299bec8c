"""Normalisations: y = γ x̂ + β, so ∂ℓ/∂γ = Σ g ⊙ x̂ and ∂ℓ/∂β = Σ g over a sample's positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_interp.influence.gradients.rules.call import LayerCall, ParameterUse, ones, trained, with_gradient_node


def layer_norm(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the gradients of a layer normalisation's scale and shift."""
    part, given = call.layer, call.given
    normal = F.layer_norm(given, part.normalized_shape, eps=part.eps)
    return _affine(call, normal, (len(given), -1, part.weight.numel() if part.elementwise_affine else 1))


def rms_norm(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the gradient of a root-mean-square normalisation's scale."""
    part, given = call.layer, call.given
    normal = F.rms_norm(given, part.normalized_shape, eps=part.eps)
    return _affine(call, normal, (len(given), -1, part.weight.numel()))


def group_norm(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the gradients of a group normalisation's scale and shift, one per channel."""
    normal = F.group_norm(call.given, call.layer.num_groups, eps=call.layer.eps)
    return _affine(call, normal, None)


def batch_norm(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the gradients of a batch normalisation's scale and shift; its statistics are frozen, as in eval mode."""
    part, given = call.layer, call.given
    if part.running_mean is None:
        return call.output, []
    shape = (1, -1) + (1,) * (given.ndim - 2)
    mean, variance = part.running_mean.reshape(shape), part.running_var.reshape(shape)
    return _affine(call, (given - mean) * torch.rsqrt(variance + part.eps), None)


def _affine(call: LayerCall, normal: Tensor, shape: tuple[int, ...] | None) -> tuple[Any, list[ParameterUse]]:
    """Sum over positions: in front of the normalised dimensions `(n, t, d)`, or behind channels where shape is None."""
    node, output = with_gradient_node(call.output)
    names = trained(call.layer, "weight", "bias")

    def summed(tensor: Tensor) -> Tensor:
        return tensor.flatten(2).sum(2) if shape is None else tensor.reshape(shape).sum(1)

    def arrange(grad: Tensor) -> Tensor:
        grad = call.grad(grad)
        grad = grad if shape is not None else grad[..., None]
        parts = {"weight": lambda: summed(grad * (normal if shape is not None else normal[..., None]))}
        parts["bias"] = lambda: summed(grad)
        return torch.cat([parts[name]() for name in names], dim=1)[:, None, None]

    return output, [ParameterUse(names, ones(normal), node, arrange)]
