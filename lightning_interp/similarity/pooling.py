"""A layer's output, a vector, map or sequence of tokens, as `(rows, d)` features."""

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
POSITIONS_PER_SAMPLE = 16  # one sample's rows depend on each other: more of them cost memory and add little
MOST_TOKENS_IN_FRONT = 8  # a class token and a few registers; a mask that is shorter still belongs to another sequence


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

    @property
    def description(self) -> str:
        """The two choices in a sentence."""
        maps = {"flatten": "one feature per channel and position", "pool": "the mean over positions of each channel"}
        tokens = {"mean": "the mean over tokens", "cls": "the first token", "flatten": "one per token and channel"}
        rows = "each of up to 16 positions is a row"
        return f"Features of maps: {maps.get(self.maps, rows)}; of sequences: {tokens.get(self.tokens, rows)}."


def feature_count(layout: Layout, pooling: Pooling) -> int:
    """Return the number of features d of a call."""
    if layout.kind == "vector" or getattr(pooling, _choice_name(layout.kind)) == "flatten":
        return torch.Size(layout.shape).numel()
    return layout.shape[-1] if layout.channels_last else layout.shape[0]


def gives_many_rows(layout: Layout, pooling: Pooling) -> bool:
    """Say whether a sample becomes several rows."""
    return layout.kind != "vector" and getattr(pooling, _choice_name(layout.kind)) == "positions"


def pool(output: Any, layout: Layout, pooling: Pooling, mask: Bool[Tensor, "n tokens"] | None) -> Float[Tensor, "r d"]:
    """Return a layer's output as features; a view where it can be.

    Args:
        output: what the layer gave.
        layout: how it is laid out.
        pooling: what to make of maps and sequences.
        mask: True for tokens that count; taken where a sequence is as long, or up to 8 tokens longer at its front.
    """
    tensor, packed_mask = unpack(output)
    assert tensor is not None
    tensor = tensor if layout.batch_first else tensor.transpose(0, 1)
    if layout.kind == "vector":
        return tensor
    choice = getattr(pooling, _choice_name(layout.kind))
    if choice == "flatten":
        return tensor.flatten(1)
    tokens = at_least_float32(tensor if layout.channels_last else tensor.movedim(1, -1))
    if layout.kind == "map":
        if choice == "pool":
            return tokens.flatten(1, -2).mean(1)
        return _grid_positions(tokens).flatten(0, -2)
    mask = packed_mask if packed_mask is not None else mask
    token_mask = None if mask is None else fit_mask(mask, tokens.shape[1])
    if token_mask is None or len(token_mask) != len(tokens):
        token_mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return _pool_tokens(tokens, choice, token_mask.to(tokens.device, torch.bool))


def fit_mask(mask: Tensor, tokens: int) -> Tensor | None:
    """Return a batch's mask for a layer's sequences of `tokens` tokens; None where it does not fit them.

    Up to 8 tokens more than the mask has are taken for those that the network puts in front (a class token), and count.
    """
    extra = tokens - mask.shape[1] if mask.ndim == 2 else -1
    return torch.cat([mask.new_ones(len(mask), extra), mask], dim=1) if 0 <= extra <= MOST_TOKENS_IN_FRONT else None


def _pool_tokens(tokens: Tensor, choice: str, mask: Tensor) -> Tensor:
    if choice == "cls":
        return tokens[torch.arange(len(tokens)), mask.int().argmax(1)]
    if choice == "mean":
        weights = mask[..., None]
        return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
    positions = [row.nonzero().flatten()[_even_positions(int(row.sum()), POSITIONS_PER_SAMPLE)] for row in mask]
    return torch.cat([sample[indices] for sample, indices in zip(tokens, positions, strict=True)])


def _grid_positions(maps: Float[Tensor, "n *space d"]) -> Float[Tensor, "n *grid d"]:
    """Return up to 16 positions of each map, on a regular grid."""
    per_side = int(POSITIONS_PER_SAMPLE ** (1 / (maps.ndim - 2)) + 1e-9)  # 16 ** (1/2) may round to just below 4
    for side in range(1, maps.ndim - 1):
        maps = maps.index_select(side, _even_positions(maps.shape[side], per_side).to(maps.device))
    return maps


def _even_positions(length: int, count: int) -> Int[Tensor, " k"]:
    """Return up to `count` positions, each in the middle of its share of the length."""
    count = min(length, count)
    return ((torch.arange(count) + 0.5) * length / max(1, count)).long()


def _choice_name(kind: LayoutKind) -> str:
    return "maps" if kind == "map" else "tokens"
