"""Parts of an input that are switched on and off together."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_interp.attribution.engine.explained_input import ExplainedInput
from lightning_interp.checks import check_count, tag

Regions = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Grid:
    """Equal rectangles, `side` along each dimension of the image: up to rounding, and a pixel is the least.

    >>> Grid(2)(torch.zeros(3, 2, 4))
    tensor([[0, 0, 1, 1],
            [2, 2, 3, 3]])
    """

    side: int = 8

    def __post_init__(self) -> None:
        check_count("Grid", "side", self.side)

    @property
    def name(self) -> str:
        """Tag of the parts."""
        return f"grid_{self.side}"

    def __call__(self, image: Tensor) -> Tensor:
        """Return the part `(H, W)` that each pixel of an image `(C, H, W)` belongs to."""
        labels = torch.zeros((), dtype=torch.long)
        for length in image.shape[1:]:
            side = min(self.side, length)
            labels = labels[..., None] * side + torch.arange(length) * side // length
        return labels


@dataclass(frozen=True)
class Superpixels:
    """Connected patches of about one colour, by SLIC (scikit-image).

    An image's own smallest and largest value are taken for 0 and 1, so that normalised inputs do as they are. One and
    three channels are taken as grey and RGB; more channels are clustered as they are, without a colour space.

    Reference: Achanta et al., SLIC superpixels compared to state-of-the-art superpixel methods, 2012.

    Args:
        count: about how many.
        compactness: weight of distance against colour, in units of CIELAB; the larger, the squarer.

    Raises:
        ImportError: scikit-image is not installed.
    """

    count: int = 50
    compactness: float = 10.0

    def __post_init__(self) -> None:
        check_count("Superpixels", "count", self.count)
        if not self.compactness > 0:
            raise ValueError(f"Superpixels(compactness=...): expected a positive number, got {self.compactness!r}")

    @property
    def name(self) -> str:
        """Tag of the parts."""
        return f"superpixels_{self.count}" + ("" if self.compactness == 10 else f"_{self.compactness:g}")

    def __call__(self, image: Tensor) -> Tensor:
        """Return the part `(H, W)` that each pixel of an image `(C, H, W)` belongs to."""
        try:
            slic = importlib.import_module("skimage.segmentation").slic
        except ImportError as error:
            raise ImportError(
                "Superpixels: expected scikit-image to be installed (pip install scikit-image), or parts=Grid()"
            ) from error
        pixels = image.detach().cpu().double().nan_to_num(0, 0, 0)
        coloured = len(pixels) in (1, 3)
        if len(pixels) == 1:
            pixels = pixels.expand(3, *pixels.shape[1:])
        # Lightness goes from 0 to 100, a plain channel from 0 to 1.
        compactness = self.compactness if coloured else self.compactness / 100
        labels = slic(pixels.numpy(), self.count, compactness, convert2lab=coloured, start_label=0, channel_axis=0)
        return torch.from_numpy(labels)


def each_position(sample: Tensor) -> Tensor:
    """Return one part per token, per column of a table, or per position.

    >>> each_position(torch.zeros(4))
    tensor([0, 1, 2, 3])
    """
    size = sample.shape[1:] if sample.ndim > 1 else sample.shape
    return torch.arange(size.numel()).reshape(size)


def default_regions(raw: Tensor) -> Regions:
    """Return the parts taken of an input `(n, ...)` where none are named.

    Superpixels of images, a grid where scikit-image is not installed; each token or column of anything else.
    """
    if raw.ndim < 4:
        return each_position
    installed = raw.ndim == 4 and importlib.util.find_spec("skimage") is not None
    return Superpixels() if installed else Grid()


def regions_tag(regions: Regions | None) -> str:
    """Return what a method's tag gets by its parts: their name, unless it is each token or column."""
    return "" if regions is None or regions is each_position else f"_{tag(regions)}"


def regions_of(explained: ExplainedInput, regions: Regions) -> Int[Tensor, "n *positions"]:
    """Return the part that each position of each sample belongs to: 0, 1, ..., and −1 for what is never switched off.

    Args:
        explained: whose samples; tokens that do not count, by `task.mask`, are never switched off.
        regions: sample → whole numbers, one per position; those below 0 are never switched off.

    Raises:
        ValueError: `regions` gave another shape, or no whole numbers.
    """
    raw = explained.raw
    size = tuple(raw.shape[2:] if raw.ndim > 2 else raw.shape[1:])
    labels = torch.stack([_check_labels(regions(sample), size) for sample in raw])
    mask = explained.task.mask(explained.inputs) if explained.tokens else None
    if mask is not None and mask.shape == labels.shape:
        labels = labels.masked_fill(~mask.cpu().bool(), -1)
    return torch.stack([_renumbered(sample) for sample in labels])


def _check_labels(labels: Tensor, size: tuple[int, ...]) -> Tensor:
    whole = not (labels.is_floating_point() or labels.is_complex())
    if tuple(labels.shape) != size or not whole:
        raise ValueError(
            f"parts: expected a function giving one whole number per position, {size}, got {tuple(labels.shape)} of"
            f" {labels.dtype}"
        )
    return labels.detach().cpu().long()


def _renumbered(labels: Tensor) -> Tensor:
    """Return the same parts numbered from 0 without gaps."""
    distinct, inverse = labels.clamp(min=-1).unique(return_inverse=True)
    return inverse - int(distinct[0] < 0)
