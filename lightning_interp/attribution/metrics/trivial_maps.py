"""Maps that ignore the network: baselines that an attribution method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_interp.attribution.engine.target import Target, recorded
from lightning_interp.attribution.results import Explanation
from lightning_interp.data.task import Task

# The derivative along the width, smoothed along the height; its transpose is the other one.
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


@dataclass(frozen=True)
class Centre:
    """A bump in the middle of each image, independent of its content.

    map = exp(−(dy² + dx²) / 2 spread²), dy and dx the distances from the middle as shares of height and width;
    `(n, H, W)`. Photographers put things in the middle: a method that finds objects no better than this has not been
    shown to depend on the network.

    Args:
        spread: standard deviation of the bump, as a share of the image's sides.
    """

    spread: float = 0.25

    def __post_init__(self) -> None:
        if not self.spread > 0:
            raise ValueError(f"Centre(spread=...): expected a positive share of the sides, got {self.spread!r}")

    @property
    def name(self) -> str:
        """Tag of the method."""
        return "Centre"

    def __call__(self, model: nn.Module, inputs: Any, target: Target, task: Task = Task()) -> Explanation:
        """Return the same map for each image of a batch; the model is not called.

        Args:
            model: any module.
            inputs: what `task.outputs(model, ...)` takes.
            target: class per sample `(n,)`, or a function outputs → `(n,)`.
            task: which of the inputs is explained.

        Raises:
            ValueError: the inputs are no images.
        """
        images = _images("Centre", inputs, task)
        across = [torch.exp(-(_from_middle(length) / self.spread).square() / 2) for length in images.shape[2:]]
        maps = torch.outer(*across).expand(len(images), -1, -1).clone()
        return Explanation(self.name, maps, recorded(target, len(maps)))


@dataclass(frozen=True)
class Edges:
    """Edges of each image: what guided backpropagation is mistaken for.

    map = √(gx² + gy²) of Sobel's filters on the mean over channels, the border repeated outwards; `(n, H, W)`. An
    explanation that resembles it is no evidence of what the network uses.

    Reference: Adebayo et al., Sanity Checks for Saliency Maps, 2018.
    """

    @property
    def name(self) -> str:
        """Tag of the method."""
        return "Edges"

    def __call__(self, model: nn.Module, inputs: Any, target: Target, task: Task = Task()) -> Explanation:
        """Return each image's edges; the model is not called.

        Args:
            model: any module.
            inputs: what `task.outputs(model, ...)` takes.
            target: class per sample `(n,)`, or a function outputs → `(n,)`.
            task: which of the inputs is explained.

        Raises:
            ValueError: the inputs are no images.
        """
        grey = F.pad(_images("Edges", inputs, task).mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        sobel = torch.tensor(SOBEL, dtype=grey.dtype)
        maps = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None]).norm(dim=1)
        return Explanation(self.name, maps, recorded(target, len(maps)))


def _images(owner: str, inputs: Any, task: Task) -> Float[Tensor, "n c h w"]:
    images = task.explained(inputs).detach().cpu()
    if images.ndim != 4:
        raise ValueError(f"{owner}: expected images (n, channels, H, W) as inputs, got {tuple(images.shape)}")
    return images if images.dtype is torch.float64 else images.float()


def _from_middle(length: int) -> Float[Tensor, " length"]:
    return (torch.arange(length) + 0.5) / length - 0.5
