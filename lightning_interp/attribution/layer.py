"""The layer that a class activation map is read from, and how its map comes to the input's size."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_interp.attribution.explained import NO_GRADIENT, Explained
from lightning_interp.attribution.sites import AFTER, watched
from lightning_interp.attribution.target import Target, select
from lightning_interp.batch import picked
from lightning_interp.layout import layout_of

MOST_EXTRA_TOKENS = 16
LINEAR_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class _Candidate(NamedTuple):
    """A tensor with positions that a forward gave, its gradient, the copy that was handed on and its state then."""

    site: str
    part: nn.Module
    held: Tensor
    copy: Tensor
    version: int
    gradient: Tensor | None


def find_layer(explained: Explained, target: Target) -> str:
    """Return the last site of a forward that gives a map or tokens, more than one position of which matters.

    That is the last spatial map of a convolutional network: a layer, or `layer>relu` where a function comes after it.
    Of a transformer that answers from one token, the last block's output has a gradient at that token alone, and what
    came before it is taken: the last layer whose other tokens still have one. Linear layers inside attention are passed
    over where anything else is left; of nested modules that hand on the same tensor, the innermost is named. One
    forward and backward of one sample; of the whole batch where that one has no gradient at all.

    Raises:
        ValueError: no layer gives a map or tokens.
    """
    last = ""
    whole = explained.everything  # which a target that is a function may expect
    for rows in [whole] if callable(target) else [whole[:1], whole]:
        some = Explained(explained.model, picked(explained.inputs, rows), explained.task)
        found = _candidates(some, target if callable(target) else target[: len(rows)])
        live = [one for one in found if one.gradient is not None and _live_positions(one, len(rows)) > 1]
        inner = [one for one in live if AFTER in one.site or not isinstance(one.part, nn.Linear)]
        if live:
            return (inner or live)[-1].site
        last = found[-1].site
    return last


def _candidates(explained: Explained, target: Target) -> list[_Candidate]:
    """Return what gave a map or tokens in one forward, with the target's gradient there."""
    found: list[_Candidate] = []

    def hook(site: str, part: nn.Module, given: Tensor) -> Tensor | None:
        if not _has_positions(part, given, explained.n):
            return None
        for place, earlier in enumerate(found):
            if given is earlier.copy and given._version == earlier.version:  # handed on by a container
                found[place] = earlier._replace(site=site) if AFTER in earlier.site and AFTER not in site else earlier
                return None
        held = given if given.requires_grad else given.detach().requires_grad_()
        copy = held.clone()
        found.append(_Candidate(site, part, held, copy, copy._version, None))
        return copy

    with watched(explained.model, hook):
        outputs = explained.outputs_of(explained.raw.clone())
    if not found:
        raise ValueError("layer: expected one giving a map (n, channels, H, W) or tokens (n, tokens, d), found none")
    score = select(outputs, target)
    if not score.requires_grad:
        raise ValueError(NO_GRADIENT)
    gradients = torch.autograd.grad(score.sum(), [one.held for one in found], allow_unused=True)
    return [one._replace(gradient=gradient) for one, gradient in zip(found, gradients, strict=True)]


def positions_of(layer: str, part: nn.Module, output: Tensor, n: int) -> Float[Tensor, "n c *positions"]:
    """Return a layer's output, or the gradient of it, with samples first and channels second.

    Raises:
        ValueError: it does not give one row per sample.
    """
    layout = layout_of(part, output, n)
    if layout is None:
        raise ValueError(f"layer={layer!r}: expected one row per sample, got {tuple(output.shape)} for {n} samples")
    rows = output if layout.batch_first else output.transpose(0, 1)
    return rows.movedim(-1, 1) if layout.channels_last else rows


def at_inputs_size(maps: Float[Tensor, "n *positions"], raw: Tensor, layer: str) -> Float[Tensor, "n *size"]:
    """Return a layer's maps at the size of what is explained, bilinearly (`align_corners=False`) where it is larger.

    The tokens of a network of images are laid out as the grid that has the image's proportions, without those in front
    (class tokens, registers). A sequence's maps become one number per token or step.

    Raises:
        ValueError: the positions fit no such size.
    """
    image = raw.ndim >= 4
    if image and maps.ndim == 2:
        maps = _grid(maps, raw.shape[-2:], layer)
    if image:
        size = tuple(raw.shape[2:])
        if maps.ndim - 1 != len(size):
            raise ValueError(f"layer={layer!r}: expected a map of {len(size)} dimensions, got {tuple(maps.shape[1:])}")
    else:
        size = (_length(raw, maps.shape[1]),)
        extra = maps.shape[1] - size[0]
        maps = maps[:, extra:] if 0 < extra <= MOST_EXTRA_TOKENS and maps.ndim == 2 else maps
        if maps.ndim != 2:
            raise ValueError(f"layer={layer!r}: expected one number per step, got a map {tuple(maps.shape[1:])}")
    if tuple(maps.shape[1:]) == size:
        return maps
    return F.interpolate(maps[:, None], size, mode=LINEAR_MODES[len(size)], align_corners=False)[:, 0]


def _has_positions(part: nn.Module, output: Tensor, n: int) -> bool:
    layout = layout_of(part, output, n)
    if layout is None or layout.kind == "vector":
        return False
    positions = layout.shape[:-1] if layout.channels_last else layout.shape[1:]
    return torch.Size(positions).numel() > 1


def _live_positions(one: _Candidate, n: int) -> int:
    """Return at how many positions a gradient is not zero, in the sample that has most."""
    assert one.gradient is not None
    gradient = positions_of(one.site, one.part, one.gradient, n).flatten(2)
    return int((gradient != 0).any(dim=1).sum(dim=1).max())


def _grid(maps: Float[Tensor, "n tokens"], size: torch.Size, layer: str) -> Float[Tensor, "n h w"]:
    tokens = maps.shape[1]
    for extra in range(min(MOST_EXTRA_TOKENS, tokens - 1)):
        height = round(((tokens - extra) * size[0] / size[1]) ** 0.5)
        if height and height * round(height * size[1] / size[0]) == tokens - extra:
            return maps[:, extra:].unflatten(1, (height, -1))
    raise ValueError(f"layer={layer!r}: expected tokens on a grid of an image {tuple(size)}, got {tokens} of them")


def _length(raw: Tensor, positions: int) -> int:
    """Return the number of steps of a sequence: of `(n, channels, steps)` and `(n, steps, d)` whichever fits better."""
    if raw.ndim == 2 or raw.shape[1] == positions:
        return raw.shape[1]
    return raw.shape[-1]
