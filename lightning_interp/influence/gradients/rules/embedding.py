"""Embeddings: a linear map of one-hot vectors, never written out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_interp.influence.gradients.factored import Lookup
from lightning_interp.influence.gradients.rules.call import LayerCall, ParameterUse, trained, with_gradient_node


def embedding(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the factors of a table's rows; the padding index takes no gradient."""
    if call.layer.scale_grad_by_freq or call.layer.max_norm is not None:
        return call.output, []
    node, output = with_gradient_node(call.output)
    index = call.front(call.args[0].detach())
    index = index.reshape(len(index), -1)
    padding: int | None = call.layer.padding_idx

    def arrange(grad: Tensor) -> Tensor:
        grad = call.grad(grad)
        grad = grad.reshape(len(grad), 1, -1, grad.shape[-1])
        return grad if padding is None else grad * (index != padding)[:, None, :, None]

    return output, [
        ParameterUse(trained(call.layer, "weight"), Lookup(index, call.layer.num_embeddings), node, arrange)
    ]
