"""The mean and standard deviation of a data pipeline, found and guessed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Subset

from lightning_interp.data.normalization import COMMON_CONSTANTS, normalization_of


def pixels(channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (4, channels, 6, 6), generator=torch.Generator().manual_seed(0)) / 255


@pytest.mark.parametrize(("mean", "std"), COMMON_CONSTANTS)
def test_usual_constants_are_recognised(mean: list[float], std: list[float]) -> None:
    images = pixels(len(mean))
    normalised = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    assert normalization_of(object(), normalised) == (mean, std)


def test_the_datasets_own_transform_comes_first() -> None:
    step = SimpleNamespace(mean=(0.2, 0.3, 0.4), std=torch.tensor([0.5, 0.6, 0.7]))
    dataset = SimpleNamespace(transform=SimpleNamespace(transforms=[object(), step]))
    found = normalization_of(Subset(dataset, [0]), pixels())  # type: ignore[arg-type]
    assert found is not None
    assert found[0] == [0.2, 0.3, 0.4]
    assert found[1] == pytest.approx([0.5, 0.6, 0.7])  # from float32


def test_what_is_unknown_stays_unknown() -> None:
    assert normalization_of(object(), torch.randn(4, 3, 6, 6)) is None
    assert normalization_of(object(), pixels()) is None
    statistics = SimpleNamespace(transform=SimpleNamespace(mean=lambda: 1, std=lambda: 1))
    assert normalization_of(statistics, pixels()) is None
