"""Multi-head attention: linear maps of queries, keys and values, and one of what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_interp.data.batch import at_least_float32
from lightning_interp.influence.gradients.rules.call import LayerCall, ParameterUse, ones, trained, with_gradient_node

SIDES = ("q", "k", "v")


def attention(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the factors of an `nn.MultiheadAttention`'s projections; its `bias_k` and `bias_v` have none."""
    part = call.layer
    own = 0 if part.batch_first else 1
    given = [call.argument(place, name) for place, name in enumerate(("query", "key", "value"))]
    if call.axis != own or any(side.ndim != 3 for side in given):
        return call.output, []
    given = [side.transpose(0, 1 - own) for side in given]
    projected, uses = _projected(part, given)
    attended, weights = _attended(call, projected)
    node, output = with_gradient_node(F.linear(attended, part.out_proj.weight, part.out_proj.bias))
    names = tuple(f"out_proj.{name}" for name in trained(part.out_proj, "weight", "bias"))
    uses.append(ParameterUse(names, _laid(attended.detach()), node, _laid))
    return (output.transpose(0, 1 - own), weights), uses


def _projected(part: Any, given: list[Tensor]) -> tuple[list[Tensor], list[ParameterUse]]:
    """Return queries, keys and values `(t, n, d)`: zeros added to all three are the node whose gradient is asked."""
    longest = max(map(len, given))
    node = given[0].new_zeros(longest, given[0].shape[1], 3, part.embed_dim).requires_grad_()
    biases = part.in_proj_bias.chunk(3) if part.in_proj_bias is not None else (None, None, None)
    held = [F.linear(side, w, b) for side, w, b in zip(given, _weights(part), biases, strict=True)]
    projected = [side + node[: len(side), :, place] for place, side in enumerate(held)]
    inputs = [F.pad(_laid(side.detach()), (0, 0, 0, longest - len(side))) for side in given]
    if part._qkv_same_embed_dim:
        names = trained(part, "in_proj_weight", "in_proj_bias")
        return projected, [ParameterUse(names, torch.cat(inputs, dim=1), node, _by_side)]
    uses = [
        ParameterUse(trained(part, f"{side}_proj_weight"), inputs[place], node, _only(place))
        for place, side in enumerate(SIDES)
    ]
    return projected, [*uses, ParameterUse(trained(part, "in_proj_bias"), ones(inputs[0]), node, _by_side)]


def _attended(call: LayerCall, projected: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return what attention gives before its last projection, by torch's own function with identities around it."""
    part = call.layer
    eye = torch.eye(part.embed_dim, dtype=projected[0].dtype, device=projected[0].device)
    query, key, value = projected
    names = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
    options: dict[str, Any] = {name: call.args[place] for place, name in enumerate(names, 3) if place < len(call.args)}
    options |= {name: call.kwargs[name] for name in names if name in call.kwargs}
    attended: tuple[Tensor, Tensor | None] = F.multi_head_attention_forward(
        query,
        key,
        value,
        part.embed_dim,
        part.num_heads,
        None,
        None,
        part.bias_k,
        part.bias_v,
        part.add_zero_attn,
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


def _weights(part: Any) -> tuple[Tensor, ...]:
    if part._qkv_same_embed_dim:
        return part.in_proj_weight.chunk(3)
    return tuple(getattr(part, f"{side}_proj_weight") for side in SIDES)


def _laid(steps: Tensor) -> Tensor:
    """Return `(t, n, d)` as `(n, 1, t, d)`."""
    return at_least_float32(steps.transpose(0, 1)[:, None])


def _by_side(grad: Tensor) -> Tensor:
    """Return `(t, n, 3, d)` as `(n, 3, t, d)`."""
    return at_least_float32(grad.permute(1, 2, 0, 3))


def _only(place: int) -> Callable[[Tensor], Tensor]:
    return lambda grad: _by_side(grad)[:, place : place + 1]
