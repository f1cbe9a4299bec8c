"""How a sample is shown: names, un-normalised images, words of tokens."""

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
    """How samples are shown: names, un-normalised images, words of tokens, ids.

    Args:
        class_names: name of each class; the dataset's `classes`, or numbers, when None.
        mean: what the data pipeline subtracted from images, one number or one per channel.
        std: what it then divided by, likewise.
        decode: token ids `(tokens,)` → one word per token.
        sample_id: dataset index → a name, such as a path.
        show_inputs: False for private data: then names and numbers are shown, and no inputs.
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
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"Display({name}=...): expected a function or None, got {value!r}")
        for name in ("class_names", "column_names"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"Display({name}=...): expected a list of names, got {getattr(self, name)!r}")

    def label(self, target: Tensor) -> str:
        """Return a target in words: its class, its classes if they are several, or its value."""
        values = target.detach().cpu().reshape(-1)
        if len(values) == 1:
            value = values[0].item()
            return f"{value:.4g}" if values.is_floating_point() else self._class(int(value))
        if target.ndim > 1:
            return f"of shape {tuple(target.shape)}"
        if is_zeros_and_ones(values):
            classes = [self._class(int(i)) for i in values.nonzero()[:, 0]]
            return ", ".join(classes[:4]) + (", …" if len(classes) > 4 else "") or "none"
        return "(" + ", ".join(f"{v:.3g}" for v in values[:4].tolist()) + (", …)" if len(values) > 4 else ")")

    def id(self, index: int) -> str:
        """Return the name of the sample at a dataset index."""
        return self.sample_id(index) if self.sample_id else str(index)

    def words(self, tokens: Tensor) -> list[str]:
        """Return one word per token id."""
        ids = tokens.detach().cpu()
        return list(self.decode(ids)) if self.decode else [str(i) for i in ids.tolist()]

    def column(self, index: int) -> str:
        """Return the name of a column of a table."""
        names = self.column_names
        return names[index] if names is not None and index < len(names) else f"x{index}"

    def rgb(self, value: Any) -> NDArray[np.float64]:
        """Return an image sample `(C, H, W)` or `(H, W)` as `(H, W, 3)` in [0, 1].

        With `mean` and `std`, the normalisation is undone. Without, values in [0, 1] stay, those in [0, 255] are
        divided by 255, and all others are stretched so that the minimum becomes 0 and the maximum 1. An alpha channel
        is dropped; 2 channels, or 5 and more, are averaged.
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
        if low >= 0 and 1.5 < high <= 255:  # a largest value of up to 1.5 may be augmentation's
            return image / 255
        return (image - low) / (high - low).clamp(min=1e-12)

    def _class(self, index: int) -> str:
        names = self.class_names
        return names[index] if names is not None and 0 <= index < len(names) else str(index)


def kind_of(value: Any) -> SampleKind:
    """Return what a sample is, judged by the shape and type of its main tensor.

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


@dataclass(frozen=True, eq=False)
class SampleView:
    """One sample and the network's prediction for it, in words.

    Args:
        id: name of the sample (dataset index unless the user named it otherwise).
        value: the network's input, of this sample alone, on the CPU.
        label: true class (or value) in words; empty if unknown.
        prediction: predicted class (or value) in words; empty if there is none.
        probability: of the predicted class; NaN if unknown.
        wrong: whether the prediction differs from the label; False where they cannot be compared.
        likeliest: the most probable classes in words, each with its probability, in falling order.
    """

    id: str
    value: Any
    label: str = ""
    prediction: str = ""
    probability: float = float("nan")
    wrong: bool = False
    likeliest: tuple[tuple[str, float], ...] = ()
