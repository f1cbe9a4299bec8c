"""Linear layers: ∂ℓ/∂W = Σ_t g_t a_tᵀ."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_interp.influence.rules.use import Call, Use, trained, watched


def linear(call: Call) -> tuple[Any, list[Use]]:
    """Return the factors of y = x Wᵀ + b, at any number of positions."""
    node, output = watched(call.output)

    def arrange(grad: Tensor) -> Tensor:
        grad = call.grad(grad)
        return grad.reshape(len(grad), 1, -1, grad.shape[-1])

    given = call.given
    inputs = given.reshape(len(given), 1, -1, given.shape[-1])
    return output, [Use(trained(call.layer, "weight", "bias"), inputs, node, arrange)]
