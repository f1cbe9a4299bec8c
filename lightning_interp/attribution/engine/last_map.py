"""The layer that a class activation map is read from, and how its map comes to the input's size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_interp.attribution.engine.explained_input import NO_GRADIENT
from lightning_interp.attribution.engine.sites import AFTER
from lightning_interp.network.layout import layout_of

MOST_EXTRA_TOKENS = 16
LINEAR_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Candidate(NamedTuple):
    """What a site gave in a forward, of which gradients can be taken until something is written into it."""

    site: str
    module: nn.Module
    output: Tensor
    version: int


class LastMapFinder:
    """Collects, as a hook, what may be the last map of a forward: what all sites give that give maps or tokens.

    Of nested modules that hand on the same tensor, the innermost is named. What has no gradient yet gets one.

    Args:
        n: number of samples.
        cut: whether the graph begins anew at each site, so that what is below the last one is freed while the forward
            runs, as without gradients; the last one alone is then known.
    """

    def __init__(self, n: int, cut: bool = False) -> None:
        self.n, self.cut = n, cut
        self.found: list[Candidate] = []
        self._handed_on: list[tuple[Tensor, int]] = []

    def __call__(self, site: str, part: nn.Module, given: Tensor) -> Tensor | None:
        """Note what a site gives; return what to go on with where it is another tensor."""
        if not _has_positions(part, given, self.n):
            return None
        for place, (on, version) in enumerate(self._handed_on):
            if given is on and given._version == version:  # a container hands it on
                earlier = self.found[place]
                self.found[place] = earlier._replace(site=site) if _is_function(earlier.site, site) else earlier
                return None
        begins = self.cut or not given.requires_grad
        held = given.detach().requires_grad_() if begins else given
        on = _Alias.apply(held) if begins else given  # type: ignore[no-untyped-call]
        if self.cut:
            self.found.clear()
            self._handed_on.clear()
        self.found.append(Candidate(site, part, held, held._version))
        self._handed_on.append((on, on._version))
        return on if begins else None

    def last_alone(self, scores: Float[Tensor, " n"]) -> Candidate | None:
        """Return the last site, where it is one that matters; else None: those before it must be looked at."""
        one = self.found[-1] if self.found and scores.requires_grad else None
        if one is None or one.output._version != one.version or _is_linear(one):
            return None
        return one if _live_positions(one, scores) > 1 else None

    def last_that_matters(self, scores: Float[Tensor, " n"]) -> Candidate:
        """Return the last site more than one of whose positions has a gradient in some sample; the last where none has.

        That is the last spatial map of a convolutional network: a layer, or `layer>relu` where a function comes after
        it. Of a transformer that answers from one token, the last block's output has a gradient at that token alone,
        and what came before it is taken. Linear layers inside attention are passed over where anything else is left.
        The backward goes no deeper than it must.

        Raises:
            ValueError: no site gave a map or tokens, or no gradient flows.
        """
        usable = [one for one in reversed(self.found) if one.output._version == one.version]
        if not usable:
            raise ValueError(
                "layer: expected one giving a map (n, channels, H, W) or tokens (n, tokens, d), found none"
            )
        if not scores.requires_grad:
            raise ValueError(NO_GRADIENT)
        ordered = sorted(usable, key=_is_linear)
        return next((one for one in ordered if _live_positions(one, scores) > 1), usable[0])


class _Alias(torch.autograd.Function):
    """The same values in the same memory, as a tensor that may be written into where a leaf may not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


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
    image = raw.ndim >= 4 or (raw.ndim == 3 and maps.ndim == 3)
    if image and maps.ndim == 2:
        maps = _grid(maps, raw.shape[-2:], layer)
    if image:
        size = tuple(raw.shape[1:] if raw.ndim == 3 else raw.shape[2:])
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


def _is_function(earlier: str, site: str) -> bool:
    """Say whether what a function gave is handed on by a layer, whose name is the better one."""
    return AFTER in earlier and AFTER not in site


def _is_linear(one: Candidate) -> bool:
    return AFTER not in one.site and isinstance(one.module, nn.Linear)


def _has_positions(part: nn.Module, output: Tensor, n: int) -> bool:
    layout = layout_of(part, output, n) if output.ndim > 2 else None
    if layout is None or layout.kind == "vector":
        return False
    positions = layout.shape[:-1] if layout.channels_last else layout.shape[1:]
    return torch.Size(positions).numel() > 1


def _live_positions(one: Candidate, scores: Tensor) -> int:
    """Return at how many positions of a site the scores' gradient is not zero, in the sample that has most."""
    gradient: Tensor | None = torch.autograd.grad(scores.sum(), one.output, retain_graph=True, allow_unused=True)[0]
    if gradient is None:
        return 0
    live = positions_of(one.site, one.module, gradient, len(scores)).flatten(2) != 0
    return int(live.any(dim=1).sum(dim=1).max())


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
