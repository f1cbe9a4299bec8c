"""Embeddings: a linear map of one-hot vectors, never written out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_interp.influence.gradients.factored import Lookup
from lightning_interp.influence.gradients.rules.call import LayerCall, ParameterUse, trained, with_gradient_node


def embedding(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the factors of a table's rows; the padding index takes no gradient."""
    # The first divides gradients by counts over the batch; the second rewrites rows during the forward.
    if call.layer.scale_grad_by_freq or call.layer.max_norm is not None:
        return call.output, []
    node, output = with_gradient_node(call.output)
    index = call.samples_first(call.args[0].detach())
    index = index.reshape(len(index), -1)
    padding: int | None = call.layer.padding_idx

    def arrange(gradient: Tensor) -> Tensor:
        gradient = call.output_gradient(gradient)
        gradient = gradient.reshape(len(gradient), 1, -1, gradient.shape[-1])
        return gradient if padding is None else gradient * (index != padding)[:, None, :, None]

    return output, [
        ParameterUse(trained(call.layer, "weight"), Lookup(index, call.layer.num_embeddings), node, arrange)
    ]
