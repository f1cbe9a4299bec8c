"""Ranks of an input's positions by a map, and their correlation between maps."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_interp.data.batch import at_least_float32


def rank_correlation(
    a: Float[Tensor, "n *shape"], b: Float[Tensor, "n *shape"], mask: Bool[Tensor, "n *shape"] | None = None
) -> Float[Tensor, " n"]:
    """Return Spearman's rank correlation of two sets of maps, sample by sample, in float64.

    Pearson's correlation of the ranks; equal values share the mean of theirs. NaN where a map is
    constant or not finite. Maps that are zero almost everywhere correlate by where they are zero.

    Reference: Spearman, The proof and measurement of association between two things, 1904.

    Args:
        a: one map per sample, of any shape.
        b: as many of the same shape.
        mask: which positions count, e.g. tokens that are no padding, whose zeros would agree; all when None.

    Raises:
        ValueError: the shapes differ.

    >>> rank_correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 10.0, 100.0]]))
    tensor([1.], dtype=torch.float64)
    """
    if a.ndim < 2 or a.shape != b.shape:
        raise ValueError(f"b: expected maps (n, ...) in a's shape {tuple(a.shape)}, got {tuple(b.shape)}")
    if mask is not None:
        rows = [(x[counted][None], y[counted][None]) for x, y, counted in zip(a, b, mask.to(a.device), strict=True)]
        return torch.cat([rank_correlation(x, y) for x, y in rows]) if rows else a.new_zeros(0)
    x, y = (_centred_ranks(maps.flatten(1)) for maps in (a, b))
    correlations = (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()
    return correlations.clamp(-1, 1).masked_fill(~(all_finite(a) & all_finite(b)), torch.nan)


def flat_map(maps: Float[Tensor, "n *shape"], raw: Tensor) -> Float[Tensor, "n positions"]:
    """Return one number per position of the input that the maps explain; see `at_positions`."""
    return at_positions(maps, raw).flatten(1)


def at_positions(maps: Float[Tensor, "n *shape"], raw: Tensor) -> Float[Tensor, "n *broadcastable"]:
    """Return one number per position of an input, in a shape that broadcasts over it: what is shown of a map.

    A position is a pixel (all channels of it), a step, a token, or a column of a table. Maps in the shape of an input
    `(n, channels, ...)` become the largest absolute value over channels, the picture that is shown of them. Maps that
    have one number per position stay as they are, with their sign: to rank by size, or by another summary of the
    channels, take it before: `maps.abs()`, `maps.sum(1)`.

    Args:
        maps: `(n, *positions)`, or in the shape of `raw`.
        raw: what they explain: `(n, channels, ...)`, `(n, tokens)`, `(n, columns)`; of sequences `(n, steps, d)` the
            maps must be `(n, steps)`.

    Raises:
        ValueError: the maps fit no such shape.
    """
    maps = at_least_float32(maps)
    if maps.shape == raw.shape:
        return maps if raw.ndim == 2 else maps.abs().amax(1, keepdim=True)
    if raw.ndim > 2 and maps.shape == (*raw.shape[:1], *raw.shape[2:]):
        return maps.unsqueeze(1)
    if raw.ndim == 3 and maps.shape == raw.shape[:2]:
        return maps.unsqueeze(2)
    raise ValueError(f"maps: expected one number per position of an input {tuple(raw.shape)}, got {tuple(maps.shape)}")


def rank_positions(
    values: Float[Tensor, "n positions"], counted: Bool[Tensor, "n positions"], seeds: list[int]
) -> Int[Tensor, "n positions"]:
    """Return the rank of each position, 0 for the largest value; those that do not count come last.

    Equal values come in a random order, seeded per sample: by position, the upper left of an image would come first.
    """
    random = torch.stack(
        [torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ).to(values.device)
    shuffled = values.masked_fill(~counted, -torch.inf).gather(1, random)
    order = random.gather(1, shuffled.argsort(dim=1, descending=True, stable=True))
    numbers = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, numbers)


def all_finite(maps: Float[Tensor, "n *shape"]) -> Bool[Tensor, " n"]:
    """Return whether all of each map is finite."""
    return maps.isfinite().flatten(1).all(1)


def _centred_ranks(values: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """Return ranks less their mean, exactly; equal values share the mean of theirs."""
    values = at_least_float32(values).contiguous()
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to - values.shape[1]).double() / 2
