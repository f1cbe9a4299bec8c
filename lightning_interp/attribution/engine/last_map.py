"""Finding the layer that a class activation map is read from, and resizing its maps to the input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_interp.attribution.engine.explained_input import NO_GRADIENT
from lightning_interp.attribution.engine.sites import AFTER
from lightning_interp.network.layout import layout_of

MOST_EXTRA_TOKENS = 16  # vision transformers put 1 class token and up to a few registers in front of the patches
LINEAR_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}  # by the number of a map's dimensions


class Candidate(NamedTuple):
    """A site's output in a forward: gradients of it can be taken as long as nothing is written into it.

    Args:
        site: a layer, or a function after it; see `watch_sites`.
        module: the layer.
        output: the tensor.
        version: the tensor's version counter when it was noted, which an in-place operation increments.
    """

    site: str
    module: nn.Module
    output: Tensor
    version: int


class LastMapFinder:
    """A hook that collects the candidates for the last map of a forward: every site that outputs a map or tokens.

    Of nested modules that return the same tensor, the innermost is named. A tensor without a gradient is made to
    require one.

    Args:
        n: number of samples.
        cut: whether to start a new graph at each site, so that memory below it is freed during the forward, as without
            gradients; only the last site can then be differentiated.
    """

    def __init__(self, n: int, cut: bool = False) -> None:
        self.n, self.cut = n, cut
        self.candidates: list[Candidate] = []
        self._returned: list[tuple[Tensor, int]] = []

    def __call__(self, site: str, module: nn.Module, output: Tensor) -> Tensor | None:
        """Note a site's output; return the tensor to continue with where it is another one."""
        if not _has_positions(module, output, self.n):
            return None
        for index, (earlier_output, version) in enumerate(self._returned):
            if output is earlier_output and output._version == version:  # a container returns its last layer's tensor
                earlier = self.candidates[index]
                self.candidates[index] = earlier._replace(site=site) if _is_function(earlier.site, site) else earlier
                return None
        starts_graph = self.cut or not output.requires_grad
        tensor = output.detach().requires_grad_() if starts_graph else output
        continued = _Alias.apply(tensor) if starts_graph else output  # type: ignore[no-untyped-call]
        if self.cut:
            self.candidates.clear()
            self._returned.clear()
        self.candidates.append(Candidate(site, module, tensor, tensor._version))
        self._returned.append((continued, continued._version))
        return continued if starts_graph else None

    def last_alone(self, scores: Float[Tensor, " n"]) -> Candidate | None:
        """Return the last site where `last_that_matters` would; None where earlier sites must be examined."""
        last = self.candidates[-1] if self.candidates and scores.requires_grad else None
        if last is None or last.output._version != last.version or _is_linear(last):
            return None
        return last if _live_positions(last, scores) > 1 else None

    def last_that_matters(self, scores: Float[Tensor, " n"]) -> Candidate:
        """Return the last site with a gradient at more than one position in some sample; the last one if none has.

        In a convolutional network that is the last spatial map: a layer, or `layer>relu` where a function follows it.
        In a transformer that classifies from one token, the last block's output has a gradient at that token only, so
        an earlier site is returned. Linear layers, such as those inside attention, are a last resort. The backward
        goes no deeper than needed.

        Raises:
            ValueError: no site gave a map or tokens, or no gradient flows.
        """
        # A gradient with respect to a tensor that was overwritten would belong to its new values.
        usable = [each for each in reversed(self.candidates) if each.output._version == each.version]
        if not usable:
            raise ValueError(
                "layer: expected one giving a map (n, channels, H, W) or tokens (n, tokens, d), found none"
            )
        if not scores.requires_grad:
            raise ValueError(NO_GRADIENT)
        # The sort is stable: the last site stays first, and linear layers come behind all others.
        ordered = sorted(usable, key=_is_linear)
        return next((candidate for candidate in ordered if _live_positions(candidate, scores) > 1), usable[0])


class _Alias(torch.autograd.Function):
    """The same values in the same memory as a tensor that, unlike a leaf, may be written into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def positions_of(layer: str, module: nn.Module, output: Tensor, n: int) -> Float[Tensor, "n c *positions"]:
    """Return a layer's output, or its gradient, with samples first and channels second.

    Raises:
        ValueError: it does not give one row per sample.
    """
    layout = layout_of(module, output, n)
    if layout is None:
        raise ValueError(f"layer={layer!r}: expected one row per sample, got {tuple(output.shape)} for {n} samples")
    rows = output if layout.batch_first else output.transpose(0, 1)
    return rows.movedim(-1, 1) if layout.channels_last else rows


def at_inputs_size(maps: Float[Tensor, "n *positions"], raw: Tensor, layer: str) -> Float[Tensor, "n *size"]:
    """Return a layer's maps at the size of the input, interpolated linearly (`align_corners=False`).

    Tokens of an image are laid out as a grid with the image's proportions, without those in front (class tokens,
    registers). Maps of a sequence become one number per token or step.

    Raises:
        ValueError: the positions fit no such size.
    """
    image = raw.ndim >= 4 or (raw.ndim == 3 and maps.ndim == 3)
    if image and maps.ndim == 2:
        maps = _token_grid(maps, raw.shape[-2:], layer)
    if image:
        size = tuple(raw.shape[1:] if raw.ndim == 3 else raw.shape[2:])
        if maps.ndim - 1 != len(size):
            raise ValueError(f"layer={layer!r}: expected a map of {len(size)} dimensions, got {tuple(maps.shape[1:])}")
    else:
        size = (_sequence_length(raw, maps.shape[1]),)
        extra = maps.shape[1] - size[0]
        maps = maps[:, extra:] if 0 < extra <= MOST_EXTRA_TOKENS and maps.ndim == 2 else maps
        if maps.ndim != 2:
            raise ValueError(f"layer={layer!r}: expected one number per step, got a map {tuple(maps.shape[1:])}")
    if tuple(maps.shape[1:]) == size:
        return maps
    return F.interpolate(maps[:, None], size, mode=LINEAR_MODES[len(size)], align_corners=False)[:, 0]


def _is_function(earlier: str, site: str) -> bool:
    """Return whether a function's output is returned by a layer, whose name is then the better one."""
    return AFTER in earlier and AFTER not in site


def _is_linear(candidate: Candidate) -> bool:
    return AFTER not in candidate.site and isinstance(candidate.module, nn.Linear)


def _has_positions(module: nn.Module, output: Tensor, n: int) -> bool:
    layout = layout_of(module, output, n) if output.ndim > 2 else None
    if layout is None or layout.kind == "vector":
        return False
    positions = layout.shape[:-1] if layout.channels_last else layout.shape[1:]
    return torch.Size(positions).numel() > 1


def _live_positions(candidate: Candidate, scores: Tensor) -> int:
    """Return at how many positions a site's gradient is not zero, the maximum over samples."""
    # The graph is retained for the next candidate, and for the gradients of the pass itself.
    total, output = scores.sum(), candidate.output
    gradient: Tensor | None = torch.autograd.grad(total, output, retain_graph=True, allow_unused=True)[0]
    if gradient is None:
        return 0
    live = positions_of(candidate.site, candidate.module, gradient, len(scores)).flatten(2) != 0
    return int(live.any(dim=1).sum(dim=1).max())


def _token_grid(maps: Float[Tensor, "n tokens"], size: torch.Size, layer: str) -> Float[Tensor, "n h w"]:
    tokens = maps.shape[1]
    # Nothing marks the tokens in front: the fewest without which the others form such a grid.
    for extra in range(min(MOST_EXTRA_TOKENS, tokens - 1)):
        height = round(((tokens - extra) * size[0] / size[1]) ** 0.5)
        if height and height * round(height * size[1] / size[0]) == tokens - extra:
            return maps[:, extra:].unflatten(1, (height, -1))
    raise ValueError(f"layer={layer!r}: expected tokens on a grid of an image {tuple(size)}, got {tokens} of them")


def _sequence_length(raw: Tensor, positions: int) -> int:
    """Return the number of steps of a sequence, laid out as `(n, channels, steps)` or as `(n, steps, d)`."""
    if raw.ndim == 2 or raw.shape[1] == positions:
        return raw.shape[1]
    return raw.shape[-1]
