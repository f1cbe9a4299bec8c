"""Coalitions: which parts of an input are on."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

Draw = Callable[[int, int, Generator], Tensor]


def bernoulli(n_parts: int, draws: int, generator: Generator) -> Bool[Tensor, "draws parts"]:
    """Draw coalitions with each part on with probability ½, each followed by its opposite.

    In such a pair each part is on once: the mean of every column is ½ exactly, and what is linear in the parts does not
    mix with what is of second order.
    """
    half = torch.rand((draws + 1) // 2, n_parts, generator=generator) < 0.5
    return paired(half)[:draws]


def any_size(n_parts: int, draws: int, generator: Generator) -> Bool[Tensor, "draws parts"]:
    """Draw coalitions of a size that is uniform from 0 to all parts, each followed by its opposite.

    It comes nearer to the input than `bernoulli`, half of whose parts are off: for outputs that depend on many parts at
    once, as a decision tree's on all features of a path.

    Reference: Ribeiro et al., "Why should I trust you?", 2016, section 3.3.
    """
    sizes = torch.randint(n_parts + 1, ((draws + 1) // 2,), generator=generator)
    return paired(of_sizes(sizes, n_parts, generator))[:draws]


def shapley(n_parts: int, draws: int, generator: Generator) -> Bool[Tensor, "draws parts"]:
    """Draw coalitions by the Shapley kernel, each followed by its opposite; all of them where no more than `draws`.

    The empty and the full coalition, whose kernel is infinite, are not among them.

    Reference: Lundberg and Lee, A unified approach to interpreting model predictions, 2017.
    """
    if countable(n_parts, draws):
        inner = list(itertools.product((False, True), repeat=n_parts))[1:-1]
        return torch.tensor(inner, dtype=torch.bool).reshape(len(inner), n_parts)
    sizes = torch.arange(1, n_parts)
    chances = 1 / (sizes * (n_parts - sizes)).double()
    drawn_sizes = sizes[torch.multinomial(chances, (draws + 1) // 2, replacement=True, generator=generator)]
    return paired(of_sizes(drawn_sizes, n_parts, generator))[:draws]


def countable(n_parts: int, draws: int) -> bool:
    """Return whether all coalitions but the empty and the full one are at most `draws`."""
    return 2**n_parts - 2 <= draws


def of_sizes(sizes: Tensor, n_parts: int, generator: Generator) -> Bool[Tensor, "draws parts"]:
    """Draw one coalition of each given size, uniformly among those of that size."""
    return torch.rand(len(sizes), n_parts, generator=generator).argsort(1) < sizes[:, None]


def paired(masks: Bool[Tensor, "half parts"]) -> Bool[Tensor, "draws parts"]:
    """Return each coalition followed by its opposite."""
    return torch.stack([masks, ~masks], 1).flatten(0, 1)


def distance_to_all(masks: Bool[Tensor, "draws parts"]) -> Float[Tensor, " draws"]:
    """Return the cosine distance of each coalition to that of all parts: 1 − √(share of parts on), 1 where none is."""
    return 1 - masks.double().mean(1).sqrt()


def shapley_kernel(masks: Bool[Tensor, "draws parts"]) -> Float[Tensor, " draws"]:
    """Return (M − 1) / (C(M, s) · s · (M − s)) of each coalition, s of M parts on, 0 < s < M."""
    n_parts = torch.tensor(float(masks.shape[1]), dtype=torch.float64)
    on = masks.double().sum(1)
    ways = torch.lgamma(n_parts + 1) - torch.lgamma(on + 1) - torch.lgamma(n_parts - on + 1)
    return (n_parts - 1) / (ways.exp() * on * (n_parts - on))
