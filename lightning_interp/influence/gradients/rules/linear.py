"""Linear layers: ∂ℓ/∂W = Σ_t g_t a_tᵀ."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_interp.influence.gradients.rules.call import LayerCall, ParameterUse, trained, with_gradient_node


def linear(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the factors of y = x Wᵀ + b, at any number of positions."""
    node, output = with_gradient_node(call.output)

    def arrange(grad: Tensor) -> Tensor:
        grad = call.grad(grad)
        return grad.reshape(len(grad), 1, -1, grad.shape[-1])

    given = call.given
    inputs = given.reshape(len(given), 1, -1, given.shape[-1])
    return output, [ParameterUse(trained(call.layer, "weight", "bias"), inputs, node, arrange)]
