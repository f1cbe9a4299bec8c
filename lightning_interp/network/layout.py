"""How a layer's output is laid out: samples, tokens or positions, and channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_interp.data.batch import tensors

LayoutKind = Literal["vector", "map", "tokens"]


class Layout(NamedTuple):
    """What one call of a layer gives.

    Args:
        kind: a "vector" per sample, a "map" of channels, or a sequence of "tokens".
        batch_first: whether the first dimension is the samples, else the second.
        channels_last: where a map's or a sequence's channels are.
        shape: of one sample's output, without the samples' dimension.
        packed: whether it is a packed sequence, which carries the number of tokens of each sample.
    """

    kind: LayoutKind
    batch_first: bool
    channels_last: bool
    shape: tuple[int, ...]
    packed: bool = False


def layout_of(layer: nn.Module, output: Any, n: int) -> Layout | None:
    """Return how a layer's output is laid out; None where it holds no floats with one row per sample.

    Args:
        layer: the module.
        output: what it gave for `n` samples; its first tensor counts.
        n: number of samples.
    """
    tensor, token_mask = unpack(output)
    if tensor is None or tensor.is_nested or tensor.ndim < 2 or not tensor.is_floating_point():
        return None
    second = tensor.ndim == 3 and tensor.shape[1] == n
    batch_first = tensor.shape[0] == n
    packed = token_mask is not None
    if packed:
        batch_first = True
    elif getattr(layer, "batch_first", None) is False and second:
        batch_first = False
    elif not batch_first and not second:
        return None
    shape = tuple(tensor.shape[1:] if batch_first else (tensor.shape[0], *tensor.shape[2:]))
    if tensor.ndim == 2:
        return Layout("vector", True, True, shape)
    last = _channels_last(layer, tensor.shape if batch_first else (tensor.shape[1], tensor.shape[0], *tensor.shape[2:]))
    return Layout("tokens" if tensor.ndim == 3 and last else "map", batch_first, last, shape, packed)


def common_layout(first: Layout | None, second: Layout | None) -> Layout | None:
    """Return the layout of a call in forwards of two numbers of samples; None where no layout fits both.

    A sequence may happen to be as long as there are samples, and then its first dimension is taken for the samples; the
    forward with the other number decides.
    """
    if first is None or second is None or first.kind != second.kind:
        return None
    return second if first.batch_first else first


def unpack(output: Any) -> tuple[Tensor | None, Bool[Tensor, "n tokens"] | None]:
    """Return an output's first tensor, and which tokens count if it is a packed sequence."""
    packed = next((value for value in (output, *_outputs(output)) if isinstance(value, PackedSequence)), None)
    if packed is None:
        return next(tensors(output), None), None
    tensor, lengths = pad_packed_sequence(packed, batch_first=True)
    return tensor, torch.arange(tensor.shape[1]) < lengths[:, None]


def _outputs(output: Any) -> tuple[Any, ...]:
    return tuple(output[:1]) if isinstance(output, (tuple, list)) and not isinstance(output, PackedSequence) else ()


def _channels_last(layer: nn.Module, shape: Sequence[int]) -> bool:
    """Say whether the channels come last, by the last submodule that gives as many; else maps have them first."""
    for inner in reversed(list(layer.modules())):
        if (channels := _channels(inner)) is not None:
            first, last = shape[1] == channels, shape[-1] == channels
            if first != last:
                return last
            if first:
                return not any(dimension in type(inner).__name__ for dimension in ("1d", "2d", "3d"))
    return len(shape) == 3 and not any(dimension in type(layer).__name__ for dimension in ("1d", "2d", "3d"))


def _channels(layer: nn.Module) -> int | None:
    """Return how many channels a layer gives; None where no attribute gives it."""
    shape = getattr(layer, "normalized_shape", None)
    if shape:
        return int(tuple(shape)[-1])
    if isinstance(layer, nn.RNNBase):
        return (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
    names = ("out_features", "out_channels", "num_features", "num_channels", "embedding_dim", "embed_dim")
    channels = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
    return channels if isinstance(channels, int) else None
