"""Display: how a sample is shown to a reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_interp.data.batch import is_zeros_and_ones, main_tensor

SampleKind = Literal["image", "table", "tokens", "other"]


@dataclass(frozen=True)
class Display:
    """How samples are shown: names, un-normalisation, tokens to text, ids.

    Args:
        class_names: name of each class; the dataset's `classes`, or numbers, when None.
        mean: that the data pipeline subtracted, one number or one per channel.
        std: that it divided by, likewise.
        decode: token ids `(tokens,)` → one word per token.
        sample_id: dataset index → the name to show, e.g. a path.
        show_inputs: False for private data: names and numbers are shown, inputs are not.
        column_names: name of each column of a table; `x0`, `x1`, ... when None.

    >>> Display(class_names=["cat", "dog"]).label(torch.tensor(1))
    'dog'
    """

    class_names: Sequence[str] | None = None
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    decode: Callable[[Tensor], Sequence[str]] | None = None
    sample_id: Callable[[int], str] | None = None
    show_inputs: bool = True
    column_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"Display: expected mean and std together, got mean={self.mean}, std={self.std}")
        for name in ("decode", "sample_id"):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise TypeError(f"Display({name}=...): expected a function or None, got {given!r}")
        for name in ("class_names", "column_names"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"Display({name}=...): expected a list of names, got {getattr(self, name)!r}")

    def label(self, target: Tensor) -> str:
        """Return a target in words: the class, the classes of a multi-label row, or the value."""
        values = target.detach().cpu().reshape(-1)
        if len(values) == 1:
            value = values[0].item()
            return self._class(int(value)) if _whole(values) else f"{value:.4g}"
        if target.ndim > 1:
            return f"of shape {tuple(target.shape)}"
        if is_zeros_and_ones(values):
            on = [self._class(int(i)) for i in values.nonzero()[:, 0]]
            return ", ".join(on[:4]) + (", …" if len(on) > 4 else "") or "none"
        return "(" + ", ".join(f"{v:.3g}" for v in values[:4].tolist()) + (", …)" if len(values) > 4 else ")")

    def id(self, index: int) -> str:
        """Return the name of the sample at a dataset index."""
        return self.sample_id(index) if self.sample_id else str(index)

    def words(self, tokens: Tensor) -> list[str]:
        """Return one word per token id."""
        ids = tokens.detach().cpu()
        return list(self.decode(ids)) if self.decode else [str(i) for i in ids.tolist()]

    def column(self, index: int) -> str:
        """Return the name of a table's column."""
        names = self.column_names
        return names[index] if names is not None and index < len(names) else f"x{index}"

    def rgb(self, value: Any) -> NDArray[np.float64]:
        """Return an image sample `(C, H, W)` or `(H, W)` as `(H, W, 3)` in [0, 1].

        Un-normalised by `mean` and `std` if they are given; else values in [0, 1] stay, in [0, 255] are divided,
        and anything else is stretched from its minimum to its maximum. Other than 1, 3 or 4 channels are averaged.
        """
        image = main_tensor(value).detach().cpu().double()
        image = image[None] if image.ndim == 2 else image
        image = self._unnormalised(image)
        image = image[:3] if len(image) in (3, 4) else image.mean(0, keepdim=True)
        return image.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).numpy()

    def _unnormalised(self, image: Tensor) -> Tensor:
        if self.mean is not None and self.std is not None:
            mean, std = (torch.as_tensor(v, dtype=image.dtype).reshape(-1, 1, 1) for v in (self.mean, self.std))
            return image * std + mean
        low, high = image.min(), image.max()
        if low >= 0 and high <= 1:
            return image
        if low >= 0 and 1.5 < high <= 255:
            return image / 255
        return (image - low) / (high - low).clamp(min=1e-12)

    def _class(self, index: int) -> str:
        names = self.class_names
        return names[index] if names is not None and 0 <= index < len(names) else str(index)


def kind_of(value: Any) -> SampleKind:
    """Say what one sample of a model input is, from its main tensor's shape and type.

    >>> kind_of(torch.zeros(1, 28, 28)), kind_of(torch.zeros(7)), kind_of(torch.zeros(5, dtype=torch.long))
    ('image', 'table', 'tokens')
    """
    tensor = main_tensor(value)
    if tensor.ndim == 3 and tensor.shape[-1] > 1 and tensor.shape[-2] > 1:
        return "image"
    if tensor.ndim == 2 and min(tensor.shape) > 1:
        return "image"
    if tensor.ndim == 1 or (tensor.ndim == 2 and tensor.is_floating_point()):
        return "table" if tensor.is_floating_point() else "tokens"
    return "other"


def _whole(values: Tensor) -> bool:
    return not values.is_floating_point()


@dataclass(frozen=True, eq=False)
class SampleView:
    """One sample as a reader sees it: what it is, and what the network says about it.

    Args:
        id: name of the sample (dataset index unless the user named it otherwise).
        value: the network's input, one sample, on the CPU.
        label: true class (or value) in words; empty if unknown.
        prediction: predicted class in words; empty if not asked.
        probability: of the predicted class; NaN if unknown.
        wrong: whether the prediction is known to differ from the label.
        likeliest: the most probable classes in words, each with its probability, the first first.
    """

    id: str
    value: Any
    label: str = ""
    prediction: str = ""
    probability: float = float("nan")
    wrong: bool = False
    likeliest: tuple[tuple[str, float], ...] = ()
