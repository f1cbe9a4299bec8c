"""Maps that look at no network."""

from __future__ import annotations

import math

import pytest
import scipy.ndimage
import torch
from torch import nn

from lightning_interp.attribution import Centre, Edges


class Untouchable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a baseline called the network")


def test_the_centre_is_a_bump() -> None:
    found = Centre(spread=0.2)(Untouchable(), torch.randn(2, 3, 6, 9), torch.tensor([1, 0]))
    expected = [
        [math.exp(-(((y + 0.5) / 6 - 0.5) ** 2 + ((x + 0.5) / 9 - 0.5) ** 2) / (2 * 0.2**2)) for x in range(9)]
        for y in range(6)
    ]
    assert torch.allclose(found.maps, torch.tensor([expected] * 2), atol=1e-6)
    assert (found.method, found.target.tolist()) == ("Centre", [1, 0])


def test_edges_are_sobels() -> None:
    images = torch.randn(3, 4, 7, 8).double()
    found = Edges()(Untouchable(), images, torch.tensor([0, 1, 2]))
    for map_, image in zip(found.maps, images.mean(1).numpy(), strict=True):
        sides = [scipy.ndimage.sobel(image, axis=axis, mode="nearest") for axis in (0, 1)]
        assert torch.allclose(map_, torch.tensor((sides[0] ** 2 + sides[1] ** 2) ** 0.5), atol=1e-12)
    assert found.method == "Edges"
    assert float(Edges()(Untouchable(), torch.ones(1, 1, 5, 5), torch.tensor([0])).maps.abs().max()) == 0


def test_images_of_bytes_and_half_precision() -> None:
    target = torch.tensor([0])
    image = torch.randint(0, 255, (1, 3, 5, 5), dtype=torch.uint8)
    expected = Edges()(Untouchable(), image.float(), target).maps
    assert torch.allclose(Edges()(Untouchable(), image, target).maps, expected)
    assert torch.allclose(Edges()(Untouchable(), image.bfloat16(), target).maps, expected)
    assert torch.equal(Centre()(Untouchable(), image, target).maps, Centre()(Untouchable(), image.float(), target).maps)


def test_only_images_have_them() -> None:
    for method in (Centre(), Edges()):
        with pytest.raises(
            ValueError, match=rf"{method.name}: expected images \(n, channels, H, W\) as inputs, got \(2, 5\)"
        ):
            method(Untouchable(), torch.randn(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"Centre\(spread=...\): expected a positive share of the sides, got 0"):
        Centre(spread=0.0)
