"""From whatever a layer gives to `(rows, d)` features: vectors, maps, sequences of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_interp.data.batch import at_least_float32
from lightning_interp.network.layout import Layout, LayoutKind, unpack

Maps = Literal["flatten", "pool", "positions"]
Tokens = Literal["mean", "cls", "positions", "flatten"]
PLACES = 16
MOST_ADDED = 8


@dataclass(frozen=True)
class Pooling:
    """How maps and sequences become features; each choice measures another quantity.

    Args:
        maps: "flatten" `(n, C · H · W)`, "pool" the mean over positions `(n, C)`, or "positions": each of up to 16
            positions on a regular grid is a row, `(n · 16, C)`.
        tokens: "mean" over the tokens that the mask keeps `(n, d)`, "cls" the first of them, "positions": each of up
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
        default = Pooling()
        changed = [name for name in ("maps", "tokens") if getattr(self, name) != getattr(default, name)]
        return "".join(f"_{name}_{getattr(self, name)}" for name in changed)


def width(layout: Layout, reading: Pooling) -> int:
    """Return the number of features d of a call."""
    if layout.kind == "vector" or getattr(reading, _argument(layout.kind)) == "flatten":
        return torch.Size(layout.shape).numel()
    return layout.shape[-1] if layout.channels_last else layout.shape[0]


def many_rows(layout: Layout, reading: Pooling) -> bool:
    """Say whether a sample becomes several rows."""
    return layout.kind != "vector" and getattr(reading, _argument(layout.kind)) == "positions"


def rows(output: Any, layout: Layout, reading: Pooling, mask: Bool[Tensor, "n tokens"] | None) -> Float[Tensor, "r d"]:
    """Return a layer's output as features; a view where it can be.

    Args:
        output: what the layer gave.
        layout: how it is laid out.
        reading: what to make of maps and sequences.
        mask: True for tokens that count; taken where a sequence is as long, or up to 8 tokens longer at its front.
    """
    tensor, own = unpack(output)
    assert tensor is not None
    tensor = tensor if layout.batch_first else tensor.transpose(0, 1)
    if layout.kind == "vector":
        return tensor
    choice = getattr(reading, _argument(layout.kind))
    if choice == "flatten":
        return tensor.flatten(1)
    tokens = at_least_float32(tensor if layout.channels_last else tensor.movedim(1, -1))
    if layout.kind == "map":
        if choice == "pool":
            return tokens.flatten(1, -2).mean(1)
        return _grid(tokens).flatten(0, -2)
    mask = own if own is not None else mask
    kept = None if mask is None else fitted(mask, tokens.shape[1])
    if kept is None or len(kept) != len(tokens):
        kept = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return _of_tokens(tokens, choice, kept.to(tokens.device, torch.bool))


def fitted(mask: Tensor, tokens: int) -> Tensor | None:
    """Return a mask `(n, given)` for sequences of so many tokens; None where it fits in no way.

    Up to 8 more than the mask tells of are tokens that the network puts in front (a class token), and count.
    """
    added = tokens - mask.shape[1] if mask.ndim == 2 else -1
    return torch.cat([mask.new_ones(len(mask), added), mask], dim=1) if 0 <= added <= MOST_ADDED else None


def _of_tokens(tokens: Tensor, choice: str, mask: Tensor) -> Tensor:
    if choice == "cls":
        return tokens[torch.arange(len(tokens)), mask.int().argmax(1)]
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


def _argument(kind: LayoutKind) -> str:
    return "maps" if kind == "map" else "tokens"
