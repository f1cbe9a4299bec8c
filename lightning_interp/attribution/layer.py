"""The layer that a class activation map is read from, and how its map comes to the input's size."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_interp.attribution.explained import NO_GRADIENT
from lightning_interp.batch import map_tensors, tensors
from lightning_interp.capture import hooked
from lightning_interp.layout import layout_of

KEPT, PIECES = 16, 8
MOST_EXTRA_TOKENS = 16
LINEAR_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class At(NamedTuple):
    """A layer and what it gave, of which gradients can be taken."""

    name: str
    part: nn.Module
    output: Tensor


class Traced(NamedTuple):
    """What a layer gave in a forward, as far as it is kept.

    Args:
        name: of the layer.
        part: the layer.
        edge: where its output's gradient is found; None where the graph was cut.
        like: a tensor in the output's shape.
        output: what gradients are taken of; None where it was not kept.
        handed_on: the tensor that the model goes on with, the output itself or a copy; None where it was not kept.
        version: of the output; another one tells later that it has been written into since.
        below: the output with what it was computed from, where the graph was cut there.
    """

    name: str
    part: nn.Module
    edge: GradientEdge | None
    like: Tensor
    output: Tensor | None
    handed_on: Tensor | None
    version: int
    below: Tensor | None = None

    @property
    def at(self) -> At | None:
        """The layer and its output; None where that is gone or was written into."""
        if self.output is None or self.output._version != self.version:
            return None
        return At(self.name, self.part, self.output)


@contextlib.contextmanager
def outputs_traced(model: nn.Module, cut: bool = False) -> Iterator[list[Traced]]:
    """Collect what may be maps or tokens of all layers, in the order of the forwards inside.

    Of nested modules that hand on the same tensor, the innermost is named. Nothing is copied. Only the last outputs are
    kept: all of them would take as much memory again as a backward needs.

    Args:
        model: whose layers.
        cut: whether the graph begins anew at each output, so that what is far below the last ones is freed while the
            forward runs, as without gradients. The last ones alone are then
            collected, and no linear layers.
    """
    found: list[Traced] = []

    def hook(layer: str, part: nn.Module, _: Any, output: Any) -> Any:
        given = output if isinstance(output, Tensor) else next(tensors(output), None)
        if given is None or given.ndim < 3 or not given.is_floating_point() or (cut and isinstance(part, nn.Linear)):
            return None
        if any(given is each.handed_on and each.version == given._version for each in found[-KEPT:]):
            return None
        begins = cut or not given.requires_grad
        held = given.detach().requires_grad_() if begins else given
        on: Tensor = _Alias.apply(held) if begins else given  # type: ignore[no-untyped-call]
        if cut:
            below = given if given.requires_grad else None
            found.append(Traced(layer, part, None, held, held, on, held._version, below))
            del found[:-PIECES]
            return on if given is output else map_tensors(lambda t: on if t is given else t, output)
        like = torch.empty_like(given, device="meta")
        found.append(Traced(layer, part, get_gradient_edge(held), like, held, on, held._version))
        if len(found) > KEPT:
            found[-KEPT - 1] = found[-KEPT - 1]._replace(output=None, handed_on=None)
        return map_tensors(lambda t: on if t is given else t, output) if begins else None

    with hooked(model, [name for name, _ in model.named_modules() if name], hook):
        yield found


def last_that_matters(found: Sequence[Traced], scores: Float[Tensor, " n"]) -> Traced:
    """Return the last layer more than one of whose positions has a gradient in some sample.

    That is the last spatial map of a convolutional network. Of a transformer that answers from one token, the last
    block's output has a gradient at that token alone, and what came before it is taken: the last layer whose other
    tokens still have one. Linear layers inside attention are passed over where anything else is left. Where no layer
    has such a gradient, it is the last of all. The backward goes no deeper than it must.

    Raises:
        ValueError: no layer gave a map or tokens, or no gradient flows.
    """
    n = len(scores)
    last = next(_with_positions(found, n), None)
    if last is None:
        raise ValueError(
            "layer: expected one that gives a map (n, channels, H, W) or tokens (n, tokens, d); found none"
        )
    if not scores.requires_grad:
        raise ValueError(NO_GRADIENT)
    inner = (each for each in _with_positions(found, n) if not isinstance(each.part, nn.Linear))
    linear = (each for each in _with_positions(found, n) if isinstance(each.part, nn.Linear))
    return _first_live(inner, scores) or _first_live(linear, scores) or last


def last_of_pieces(found: Sequence[Traced], scores: Float[Tensor, " n"]) -> tuple[Traced, Tensor] | None:
    """Return what `last_that_matters` does, of a graph that was cut, with its gradient; None where it is not known.

    Raises:
        ValueError: no gradient flows.
    """
    if not scores.requires_grad:
        raise ValueError(NO_GRADIENT)
    for each, gradient in _piece_by_piece(found, scores):
        if gradient is None or not list(_with_positions([each], len(scores))):
            continue
        if _live_positions(positions_of(each.name, each.part, gradient, len(scores))) > 1:
            return each, gradient
    return None


def _piece_by_piece(found: Sequence[Traced], scores: Tensor) -> Iterator[tuple[Traced, Tensor | None]]:
    """Yield outputs and their whole gradients, the last first; the backward goes through one piece at a time."""
    outputs = [each.output for each in found if each.output is not None]
    totals = list(torch.autograd.grad(scores.sum(), outputs, None, True, allow_unused=True)) if outputs else []
    for i in reversed(range(len(outputs))):
        total, below = totals[i], found[i].below
        yield found[i], total
        if total is None or below is None or i == 0:
            continue
        more = torch.autograd.grad(below, outputs[:i], total, True, allow_unused=True)
        totals[:i] = [a if b is None else b if a is None else a + b for a, b in zip(totals[:i], more, strict=True)]


class _Alias(torch.autograd.Function):
    """The same values in the same memory, as a tensor that may be written into where a leaf may not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _with_positions(found: Sequence[Traced], n: int) -> Iterator[Traced]:
    """Yield those that give maps or tokens, the last first."""
    for each in reversed(found):
        layout = layout_of(each.part, each.like, n)
        if layout is None or layout.kind == "vector":
            continue
        if math.prod(layout.shape[:-1] if layout.channels_last else layout.shape[1:]) > 1:
            yield each


def _first_live(candidates: Iterator[Traced], scores: Tensor) -> Traced | None:
    """Return the first with a gradient at more than one position; the backward goes through more of them each time."""
    several = 1
    while some := list(itertools.islice(candidates, several)):
        gradients = torch.autograd.grad(
            scores.sum(), [each.edge for each in some if each.edge is not None], None, True, allow_unused=True
        )
        for each, gradient in zip(some, gradients, strict=True):
            if gradient is not None and _live_positions(positions_of(each.name, each.part, gradient, len(scores))) > 1:
                return each
        several *= 4
    return None


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


def _live_positions(gradient: Float[Tensor, "n c *positions"]) -> int:
    """Return at how many positions a gradient is not zero, in the sample that has most."""
    return int((gradient.flatten(2) != 0).any(dim=1).sum(dim=1).max())


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
