"""The mean and standard deviation that a data pipeline normalised images by, read from it or guessed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Subset

Constants = tuple[list[float], list[float]]
COMMON_CONSTANTS: tuple[Constants, ...] = (
    ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),  # ImageNet
    ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),  # CIFAR-10, and its older deviations
    ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),  # CIFAR-100
    ([0.1307], [0.3081]),  # MNIST
    ([0.2860], [0.3530]),  # Fashion-MNIST
    ([0.5], [0.5]),
)
HIGHEST_LEVEL = 255  # of an 8-bit pixel
LEVEL_TOLERANCE = 0.02  # by chance a value is so near to a whole level in 4% of cases, an image never
DEEPEST_TRANSFORM = 4  # VisionDataset.transforms → StandardTransform.transform → Compose.transforms → Normalize


def normalization_of(dataset: Any, images: Float[Tensor, "n c h w"]) -> Constants | None:
    """Return the mean and standard deviation that images were normalised by; None where they are not found.

    They are read from the dataset's transforms where one has a `mean` and a `std`. Otherwise constants in wide use are
    tried: they are right where undoing them gives 8-bit pixels, multiples of 1/255 in [0, 1].

    Args:
        dataset: through any `Subset`.
        images: some of them, as the network gets them.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    channels = images.shape[1]
    for step in _normalizing_transforms(dataset, DEEPEST_TRANSFORM):
        mean, std = _as_floats(step.mean), _as_floats(step.std)
        if mean and len(mean) == len(std) and len(mean) in (1, channels):
            return mean, std
    if images.min() >= 0:
        return None
    candidates = ((mean, std) for mean, std in COMMON_CONSTANTS if len(mean) in (1, channels))
    return next(((mean, std) for mean, std in candidates if _gives_pixels(images, mean, std)), None)


def _normalizing_transforms(owner: Any, depth: int) -> Iterator[Any]:
    """Yield the transforms of an object that have a mean and a standard deviation, however nested."""
    for name in ("transform", "transforms"):
        transforms = getattr(owner, name, None)
        for step in transforms if isinstance(transforms, (list, tuple)) else [transforms]:
            if step is None:
                continue
            if hasattr(step, "mean") and hasattr(step, "std") and not isinstance(step, Tensor):
                yield step
            elif depth:
                yield from _normalizing_transforms(step, depth - 1)


def _as_floats(values: Any) -> list[float]:
    """Return numbers as a list; an empty one for anything else, such as a method `mean`."""
    if callable(values):
        return []
    try:
        return [float(value) for value in torch.as_tensor(values, dtype=torch.float64).flatten()]
    except (TypeError, ValueError, RuntimeError):
        return []


def _gives_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> bool:
    shape = (-1, 1, 1)
    levels = HIGHEST_LEVEL * (images.double() * torch.tensor(std).reshape(shape) + torch.tensor(mean).reshape(shape))
    inside = bool(((levels > -LEVEL_TOLERANCE) & (levels < HIGHEST_LEVEL + LEVEL_TOLERANCE)).all())
    return inside and bool(((levels - levels.round()).abs() < LEVEL_TOLERANCE).all())
