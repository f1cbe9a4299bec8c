"""Multi-head attention: linear maps of queries, keys and values, and one of what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_interp.data.batch import at_least_float32
from lightning_interp.influence.gradients.rules.call import LayerCall, ParameterUse, ones, trained, with_gradient_node

SIDES = ("q", "k", "v")  # as torch names the three weights where their widths differ


def attention(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the factors of an `nn.MultiheadAttention`'s projections; its `bias_k` and `bias_v` have none."""
    layer = call.layer
    sample_axis = 0 if layer.batch_first else 1
    inputs = [call.argument(position, name) for position, name in enumerate(("query", "key", "value"))]
    if call.axis != sample_axis or any(tensor.ndim != 3 for tensor in inputs):
        return call.output, []
    inputs = [tensor.transpose(0, 1 - sample_axis) for tensor in inputs]
    projections, uses = _project_inputs(layer, inputs)
    attended, weights = _attend(call, projections)
    node, output = with_gradient_node(F.linear(attended, layer.out_proj.weight, layer.out_proj.bias))
    names = tuple(f"out_proj.{name}" for name in trained(layer.out_proj, "weight", "bias"))
    uses.append(ParameterUse(names, _samples_first(attended.detach()), node, _samples_first))
    return (output.transpose(0, 1 - sample_axis), weights), uses


def _project_inputs(layer: Any, inputs: list[Tensor]) -> tuple[list[Tensor], list[ParameterUse]]:
    """Return queries, keys and values `(t, n, d)`: zeros added to all three are the node that is differentiated."""
    # Queries and keys may differ in length; one node of the longest serves all three.
    longest = max(map(len, inputs))
    node = inputs[0].new_zeros(longest, inputs[0].shape[1], 3, layer.embed_dim).requires_grad_()
    biases = layer.in_proj_bias.chunk(3) if layer.in_proj_bias is not None else (None, None, None)
    projections = [
        F.linear(tensor, weight, bias)
        for tensor, weight, bias in zip(inputs, _projection_weights(layer), biases, strict=True)
    ]
    projections = [tensor + node[: len(tensor), :, side] for side, tensor in enumerate(projections)]
    factors = [F.pad(_samples_first(tensor.detach()), (0, 0, 0, longest - len(tensor))) for tensor in inputs]
    if layer._qkv_same_embed_dim:
        names = trained(layer, "in_proj_weight", "in_proj_bias")
        return projections, [ParameterUse(names, torch.cat(factors, dim=1), node, _by_side)]
    uses = [
        ParameterUse(trained(layer, f"{name}_proj_weight"), factors[side], node, _only(side))
        for side, name in enumerate(SIDES)
    ]
    return projections, [*uses, ParameterUse(trained(layer, "in_proj_bias"), ones(factors[0]), node, _by_side)]


def _attend(call: LayerCall, projections: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return what attention gives before its last projection, by torch's own function with identities around it."""
    layer = call.layer
    # The projections are applied already, but the function requires weights.
    eye = torch.eye(layer.embed_dim, dtype=projections[0].dtype, device=projections[0].device)
    query, key, value = projections
    names = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
    options: dict[str, Any] = dict(zip(names, call.args[3:], strict=False))
    options |= {name: call.kwargs[name] for name in names if name in call.kwargs}
    attended: tuple[Tensor, Tensor | None] = F.multi_head_attention_forward(
        query,
        key,
        value,
        layer.embed_dim,
        layer.num_heads,
        None,
        None,
        layer.bias_k,
        layer.bias_v,
        layer.add_zero_attn,
        0.0,
        eye,
        None,
        training=False,
        use_separate_proj_weight=True,
        q_proj_weight=eye,
        k_proj_weight=eye,
        v_proj_weight=eye,
        **options,
    )
    return attended


def _projection_weights(layer: Any) -> tuple[Tensor, ...]:
    if layer._qkv_same_embed_dim:
        return layer.in_proj_weight.chunk(3)
    return tuple(getattr(layer, f"{name}_proj_weight") for name in SIDES)


def _samples_first(steps: Tensor) -> Tensor:
    """Return `(t, n, d)` as `(n, 1, t, d)`."""
    return at_least_float32(steps.transpose(0, 1)[:, None])


def _by_side(gradient: Tensor) -> Tensor:
    """Return `(t, n, 3, d)` as `(n, 3, t, d)`."""
    return at_least_float32(gradient.permute(1, 2, 0, 3))


def _only(side: int) -> Callable[[Tensor], Tensor]:
    return lambda gradient: _by_side(gradient)[:, side : side + 1]
