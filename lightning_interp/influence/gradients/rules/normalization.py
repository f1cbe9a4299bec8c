"""Normalisations: y = γ x̂ + β, so ∂ℓ/∂γ = Σ g ⊙ x̂ and ∂ℓ/∂β = Σ g over a sample's positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_interp.influence.gradients.rules.call import LayerCall, ParameterUse, ones, trained, with_gradient_node


def layer_norm(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the gradients of a layer normalisation's scale and shift."""
    layer, inputs = call.layer, call.inputs
    normalized = F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
    return _affine(call, normalized, (len(inputs), -1, layer.weight.numel() if layer.elementwise_affine else 1))


def rms_norm(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the gradient of a root-mean-square normalisation's scale."""
    layer, inputs = call.layer, call.inputs
    normalized = F.rms_norm(inputs, layer.normalized_shape, eps=layer.eps)
    return _affine(call, normalized, (len(inputs), -1, layer.weight.numel()))


def group_norm(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the gradients of a group normalisation's scale and shift, one per channel."""
    normalized = F.group_norm(call.inputs, call.layer.num_groups, eps=call.layer.eps)
    return _affine(call, normalized, None)


def batch_norm(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the gradients of a batch normalisation's scale and shift; its statistics are frozen, as in eval mode."""
    layer, inputs = call.layer, call.inputs
    if layer.running_mean is None:  # it normalises by the batch's own statistics, which mix samples
        return call.output, []
    shape = (1, -1) + (1,) * (inputs.ndim - 2)
    mean, variance = layer.running_mean.reshape(shape), layer.running_var.reshape(shape)
    return _affine(call, (inputs - mean) * torch.rsqrt(variance + layer.eps), None)


def _affine(call: LayerCall, normalized: Tensor, shape: tuple[int, ...] | None) -> tuple[Any, list[ParameterUse]]:
    """Sum over positions: in front of the normalised dimensions `(n, t, d)`, or behind channels where shape is None."""
    node, output = with_gradient_node(call.output)
    names = trained(call.layer, "weight", "bias")

    def sum_positions(tensor: Tensor) -> Tensor:
        # A dimension of one, since two-dimensional inputs have no positions behind their channels.
        return tensor[..., None].flatten(2).sum(2) if shape is None else tensor.reshape(shape).sum(1)

    def arrange(gradient: Tensor) -> Tensor:
        gradient = call.output_gradient(gradient)
        gradients = {"weight": lambda: sum_positions(gradient * normalized), "bias": lambda: sum_positions(gradient)}
        return torch.cat([gradients[name]() for name in names], dim=1)[:, None, None]

    return output, [ParameterUse(names, ones(normalized), node, arrange)]
