"""From whatever a layer gives to `(rows, d)` features: vectors, maps, sequences of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_interp.batch import precise, tensors

Maps = Literal["flatten", "pool", "positions"]
Tokens = Literal["mean", "cls", "positions", "flatten"]
Kind = Literal["vector", "map", "tokens"]
PLACES = 16


@dataclass(frozen=True)
class Reading:
    """How maps and sequences become features; each choice measures another quantity.

    Args:
        maps: "flatten" `(n, C · H · W)`, "pool" the mean over positions `(n, C)`, or "positions": each of up to 16
            positions on a regular grid is a row, `(n · 16, C)`.
        tokens: "mean" over the tokens that the mask keeps `(n, d)`, "cls" the first token, "positions": each of up
            to 16 evenly spread tokens that the mask keeps is a row, or "flatten" `(n, tokens · d)`.
    """

    maps: Maps = "flatten"
    tokens: Tokens = "mean"

    def __post_init__(self) -> None:
        for name, kinds in (("maps", Maps), ("tokens", Tokens)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(kinds))}, got {getattr(self, name)!r}")

    @property
    def tag(self) -> str:
        """What a measure's tag gets where the choice is not the default."""
        default = Reading()
        changed = [name for name in ("maps", "tokens") if getattr(self, name) != getattr(default, name)]
        return "".join(f"_{name}_{getattr(self, name)}" for name in changed)


class Layout(NamedTuple):
    """What one call of a layer gives.

    Args:
        kind: a "vector" per sample, a "map" of channels, or a sequence of "tokens".
        batch_first: whether the first dimension is the samples, else the second.
        channels_last: where a map's or a sequence's channels are.
        shape: of one sample's output, without the samples' dimension.
    """

    kind: Kind
    batch_first: bool
    channels_last: bool
    shape: tuple[int, ...]

    def width(self, reading: Reading) -> int:
        """Return the number of features d."""
        if self.kind == "vector" or getattr(reading, _argument(self.kind)) == "flatten":
            return torch.Size(self.shape).numel()
        return self.shape[-1] if self.channels_last else self.shape[0]

    def many_rows(self, reading: Reading) -> bool:
        """Say whether a sample becomes several rows."""
        return self.kind != "vector" and getattr(reading, _argument(self.kind)) == "positions"


def layout_of(part: nn.Module, output: Any, n: int) -> Layout | None:
    """Say how a layer's output is laid out; None where it holds no floats with one row per sample.

    Args:
        part: the layer.
        output: what it gave for `n` samples; its first tensor counts.
        n: number of samples.
    """
    tensor, _ = unpacked(output)
    if tensor is None or tensor.is_nested or tensor.ndim < 2 or not tensor.is_floating_point():
        return None
    second = tensor.ndim == 3 and tensor.shape[1] == n
    batch_first = tensor.shape[0] == n
    if isinstance(output, PackedSequence):
        pass
    elif getattr(part, "batch_first", None) is False and second:
        batch_first = False
    elif not batch_first and not second:
        return None
    shape = tuple(tensor.shape[1:] if batch_first else (tensor.shape[0], *tensor.shape[2:]))
    if tensor.ndim == 2:
        return Layout("vector", True, True, shape)
    last = _channels_last(part, tensor.shape if batch_first else (tensor.shape[1], tensor.shape[0], *tensor.shape[2:]))
    return Layout("tokens" if tensor.ndim == 3 and last else "map", batch_first, last, shape)


def settled(first: Layout | None, second: Layout | None) -> Layout | None:
    """Return the layout of a call that was seen with two numbers of samples; None where none fits both.

    A sequence may happen to be as long as there are samples, and then its first dimension is taken for the samples; the
    other look knows better.
    """
    if first is None or second is None or first.kind != second.kind:
        return None
    return second if first.batch_first else first


def rows(output: Any, layout: Layout, reading: Reading, mask: Bool[Tensor, "n tokens"] | None) -> Float[Tensor, "r d"]:
    """Return a layer's output as features; a view where it can be.

    Args:
        output: what the layer gave.
        layout: how it is laid out.
        reading: what to make of maps and sequences.
        mask: True for tokens that count; taken where a sequence is as long as it.
    """
    tensor, own = unpacked(output)
    assert tensor is not None
    tensor = tensor if layout.batch_first else tensor.transpose(0, 1)
    if layout.kind == "vector":
        return tensor
    choice = getattr(reading, _argument(layout.kind))
    if choice == "flatten":
        return tensor.flatten(1)
    tokens = precise(tensor if layout.channels_last else tensor.movedim(1, -1))
    if layout.kind == "map":
        if choice == "pool":
            return tokens.flatten(1, -2).mean(1)
        return _grid(tokens).flatten(0, -2)
    mask = own if own is not None else mask
    if mask is None or mask.shape != tokens.shape[:2]:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return _of_tokens(tokens, choice, mask.to(tokens.device, torch.bool))


def unpacked(output: Any) -> tuple[Tensor | None, Bool[Tensor, "n tokens"] | None]:
    """Return an output's first tensor, and which tokens count if it is a packed sequence."""
    packed = next((part for part in (output, *_parts(output)) if isinstance(part, PackedSequence)), None)
    if packed is None:
        return next(tensors(output), None), None
    tensor, lengths = pad_packed_sequence(packed, batch_first=True)
    return tensor, torch.arange(tensor.shape[1]) < lengths[:, None]


def _parts(output: Any) -> tuple[Any, ...]:
    return tuple(output[:1]) if isinstance(output, (tuple, list)) and not isinstance(output, PackedSequence) else ()


def _of_tokens(tokens: Tensor, choice: str, mask: Tensor) -> Tensor:
    if choice == "cls":
        return tokens[:, 0]
    if choice == "mean":
        kept = mask[..., None]
        return (tokens * kept).sum(1) / kept.sum(1).clamp(min=1)
    picked = [kept.nonzero().flatten()[_spread(int(kept.sum()), PLACES)] for kept in mask]
    return torch.cat([sample[places] for sample, places in zip(tokens, picked, strict=True)])


def _grid(maps: Float[Tensor, "n *space d"]) -> Float[Tensor, "n *grid d"]:
    """Return up to 16 positions of each map, on a regular grid."""
    per_side = int(PLACES ** (1 / (maps.ndim - 2)) + 1e-9)
    for side in range(1, maps.ndim - 1):
        maps = maps.index_select(side, _spread(maps.shape[side], per_side).to(maps.device))
    return maps


def _spread(length: int, count: int) -> Int[Tensor, " k"]:
    """Return up to `count` places, each in the middle of its share of the length."""
    count = min(length, count)
    return ((torch.arange(count) + 0.5) * length / max(1, count)).long()


def _argument(kind: Kind) -> str:
    return "maps" if kind == "map" else "tokens"


def _channels_last(part: nn.Module, shape: Sequence[int]) -> bool:
    """Say where the channels are, by the last layer inside that gives as many; else maps have them first."""
    for inner in reversed(list(part.modules())):
        if (channels := _channels(inner)) is not None:
            first, last = shape[1] == channels, shape[-1] == channels
            if first != last:
                return last
            if first:
                return not any(dimension in type(inner).__name__ for dimension in ("1d", "2d", "3d"))
    return len(shape) == 3 and not any(dimension in type(part).__name__ for dimension in ("1d", "2d", "3d"))


def _channels(part: nn.Module) -> int | None:
    """Return how many channels a layer gives; None where it does not say."""
    shape = getattr(part, "normalized_shape", None)
    if shape:
        return int(tuple(shape)[-1])
    if isinstance(part, nn.RNNBase):
        return (part.proj_size or part.hidden_size) * (2 if part.bidirectional else 1)
    names = ("out_features", "out_channels", "num_features", "num_channels", "embedding_dim", "embed_dim")
    found = next((getattr(part, name) for name in names if hasattr(part, name)), None)
    return found if isinstance(found, int) else None
