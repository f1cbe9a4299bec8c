"""The sketch estimates the exact values without bias, and says what it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_interp.similarity import CKA, SVCCA
from lightning_interp.similarity.activations import find_activations, representations
from lightning_interp.similarity.sketch import Sketch


class Wide(nn.Module):
    """Two wide layers that share a few directions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 3000), nn.Linear(3000, 2000)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("debiased", [False, True])
def test_unbiased_and_better_with_size(debiased: bool) -> None:
    net, images = Wide().eval(), torch.randn(80, 12)
    watched = find_activations(net, net, [images[:3], images[:2]])

    def cka(**options: Any) -> float:
        found = representations(net, net, images.split(32), watched, 80, "gram", **options)
        return float(CKA(debiased=debiased).between(found["first"], found["second"]))

    exact = cka()
    errors = {size: [cka(sketch=size, key=str(seed)) - exact for seed in range(30)] for size in (64, 512)}
    assert abs(np.mean(errors[512])) < 3 * np.std(errors[512]) / 30**0.5 + 0.003
    assert np.std(errors[512]) < 0.6 * np.std(errors[64])
    assert np.std(errors[512]) < 0.02


def test_sums_of_signed_columns() -> None:
    x = torch.randn(4, 250)
    sketch = Sketch(100, "a/layer")
    found = sketch(x)
    signs = torch.stack([sketch(row[None])[0] for row in torch.eye(250)])
    assert set(signs.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(signs.abs().sum(1), torch.ones(250))
    assert torch.allclose(found, x @ signs, atol=1e-5)
    assert not torch.equal(found, Sketch(100, "b/layer")(x))
    assert torch.equal(found, Sketch(100, "a/layer")(x))


def test_a_sketch_gives_no_singular_vectors() -> None:
    net, images = Wide().eval(), torch.randn(80, 12)
    watched = find_activations(net, net, [images[:3], images[:2]]).of(["second"])
    (found,) = representations(net, net, [images], watched, 80, "gram", sketch=128).values()
    assert found.sketch == 128
    with pytest.raises(ValueError, match="or of a sketch"):
        SVCCA().between(found, found)
