"""Convolutions: a linear map of patches, one per group."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_interp.influence.gradients.rules.call import LayerCall, ParameterUse, trained, with_gradient_node


def convolution(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the factors of a convolution of one, two or three dimensions."""
    node, output = with_gradient_node(call.output)
    groups: int = call.layer.groups

    def arrange(gradient: Tensor) -> Tensor:
        gradient = call.output_gradient(gradient)
        return gradient.reshape(len(gradient), groups, gradient.shape[1] // groups, -1).transpose(2, 3)

    return output, [
        ParameterUse(trained(call.layer, "weight", "bias"), patches(call.layer, call.inputs), node, arrange)
    ]


def patches(layer: Any, inputs: Tensor) -> Tensor:
    """Return the patches a convolution of any dimension sees, `(n, groups, positions, channels · kernel)`."""
    spatial = len(layer.kernel_size)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    for axis in range(spatial):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        windows = windows.unfold(2 + axis, reach, layer.stride[axis])[..., :: layer.dilation[axis]]
    n, groups, positions = len(inputs), layer.groups, windows.shape[2 : 2 + spatial].numel()
    windows = windows.unflatten(1, (groups, -1)).movedim(2, 2 + spatial)  # a view still: copied once, at the end
    return windows.reshape(n, groups, positions, -1)
