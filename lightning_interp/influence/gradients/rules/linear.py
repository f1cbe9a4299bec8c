"""Linear layers: ∂ℓ/∂W = Σ_t g_t a_tᵀ."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_interp.influence.gradients.rules.call import LayerCall, ParameterUse, trained, with_gradient_node


def linear(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the factors of y = x Wᵀ + b, at any number of positions."""
    node, output = with_gradient_node(call.output)

    def arrange(gradient: Tensor) -> Tensor:
        gradient = call.output_gradient(gradient)
        return gradient.reshape(len(gradient), 1, -1, gradient.shape[-1])

    inputs = call.inputs
    inputs = inputs.reshape(len(inputs), 1, -1, inputs.shape[-1])
    return output, [ParameterUse(trained(call.layer, "weight", "bias"), inputs, node, arrange)]
