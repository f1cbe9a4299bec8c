"""The number that is explained, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_interp import Task
from lightning_interp.attribution import GradCAM, Saliency, select
from tests.models import Net

GOLDEN = dict(np.load(Path(__file__).parents[2] / "data" / "golden_attribution.npz"))


@pytest.fixture
def golden() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).double()
    net.load_state_dict({k.removeprefix("weights/"): torch.tensor(v) for k, v in GOLDEN.items() if "/" in k})
    return net


def value(name: str) -> Tensor:
    return torch.tensor(GOLDEN[name])


def test_saliency_of_a_callable(golden: nn.Module) -> None:
    classes = value("target")
    found = Saliency()(golden, value("inputs"), lambda o: o.softmax(1).gather(1, classes[:, None])[:, 0])
    assert torch.allclose(found.maps, value("gradient_of_probability"), atol=1e-12)
    assert found.target.tolist() == [-1] * 4


class Reads(nn.Module):
    """Takes integers without an embedding."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_token_ids_are_explained_at_their_embedding() -> None:
    net = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))
    ids, target = torch.tensor([[1, 2, 3], [4, 4, 0]]), torch.tensor([0, 1])
    found = Saliency()(net, ids, target).maps
    expected = net[2].weight[target].view(2, 3, 4).norm(dim=2)
    assert torch.allclose(found, expected.detach(), atol=1e-6)


def test_select() -> None:
    outputs = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert select(outputs, torch.tensor([1, 0])).tolist() == [2, 3]
    assert select(outputs[:, :1], torch.tensor([1, 0])).tolist() == [1, -3]
    assert select(outputs, lambda o: o.sum(1)).tolist() == [3, 7]
    assert select(outputs[:, :, None].expand(2, 2, 5), torch.tensor([1, 0])).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda: Saliency()(Net(), torch.zeros(2, 1, 8, 8), torch.tensor([0, 3])), "classes 0 to 2"),
        (lambda: Saliency()(Net(), torch.zeros(2, 1, 8, 8), torch.tensor([0])), "2 class indices"),
        (lambda: Saliency()(Net(), torch.zeros(2, 1, 8, 8), lambda o: o), "function giving shape"),
        (
            lambda: Saliency()(Reads(), torch.zeros(2, 2).long(), torch.tensor([0, 0])),
            "expected floats, or token ids",
        ),
        (lambda: GradCAM("nope")(Net(), torch.zeros(1, 1, 8, 8), torch.tensor([0])), "expected a layer of Net"),
        (lambda: GradCAM("accuracy")(Net(), torch.zeros(1, 1, 8, 8), torch.tensor([0])), "not called"),
        (lambda: GradCAM("head")(Net(), torch.zeros(1, 1, 8, 8), torch.tensor([0])), "expected an output"),
        (lambda: GradCAM()(nn.Linear(2, 2), torch.zeros(1, 2), torch.tensor([0])), "found none"),
    ],
)
def test_errors_are_named(run: Any, says: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=says):
        run()


def test_a_detached_forward_is_said_to_be_so() -> None:
    task = Task(outputs=lambda m, x: m(x).detach())
    with pytest.raises(ValueError, match="outputs with a gradient"):
        Saliency()(Net(), torch.zeros(1, 1, 8, 8), torch.tensor([0]), task=task)
