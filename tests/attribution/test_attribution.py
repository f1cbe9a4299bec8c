"""Golden maps, and what an attribution must not depend on or change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_interp import Task
from lightning_interp.attribution import GradCAM, Saliency, grad_cam, last_map_layer, select
from tests.models import Net

GOLDEN = dict(np.load(Path(__file__).parents[1] / "data" / "golden_attribution.npz"))
METHODS = [Saliency(), GradCAM()]


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


def test_saliency_is_the_gradient_of_the_logit(golden: nn.Module) -> None:
    found = Saliency()(golden, value("inputs"), value("target"))
    assert torch.allclose(found.maps, value("gradient_of_logit"), atol=1e-12)
    assert found.target.tolist() == value("target").tolist()


def test_saliency_of_a_callable(golden: nn.Module) -> None:
    classes = value("target")
    found = Saliency()(golden, value("inputs"), lambda o: o.softmax(1).gather(1, classes[:, None])[:, 0])
    assert torch.allclose(found.maps, value("gradient_of_probability"), atol=1e-12)
    assert found.target.tolist() == [-1] * 4


def test_grad_cam(golden: nn.Module) -> None:
    found = GradCAM()(golden, value("inputs"), value("target"))
    raw = value("grad_cam_raw_no_relu")
    expected = nn.functional.interpolate(raw.relu()[:, None], (32, 32), mode="bilinear", align_corners=False)[:, 0]
    assert found.layer == "3"
    assert torch.allclose(found.maps, expected, atol=1e-12)
    assert bool((found.maps >= 0).all())


def test_grad_cam_is_cam_over_its_size_on_such_a_net(golden: nn.Module) -> None:
    activations = golden[:4](value("inputs")).detach().requires_grad_()
    logits = golden[4:](activations).gather(1, value("target")[:, None])
    (gradients,) = torch.autograd.grad(logits.sum(), activations)
    raw = grad_cam(activations.detach(), gradients)
    assert torch.allclose(raw, value("grad_cam_raw_no_relu"), atol=1e-12)
    assert torch.allclose(raw * 16 * 16, value("cam_raw"), atol=1e-10)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_no_map_depends_on_its_neighbours(method: Any) -> None:
    net, x, target = Net().train(), torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 1, 0])
    together = method(net, x, target).maps
    alone = torch.cat([method(net, x[i : i + 1], target[i : i + 1]).maps for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-6)
    other = method(net, torch.cat([x[:1], 100 * torch.randn(4, 1, 8, 8)]), target).maps
    assert torch.allclose(other[0], together[0], atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_model_is_left_as_it_was(method: Any) -> None:
    net, x = Net().train(), torch.randn(2, 1, 8, 8, requires_grad=True)
    net.norm.eval()
    net.conv1.weight.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        method(net, x, torch.tensor([0, 1]))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules() if not isinstance(m, nn.BatchNorm2d)].count(False) == 0
    assert not net.norm.training
    assert not net.conv1.weight.requires_grad
    assert bool((net.head.weight.grad == 1).all())
    assert x.grad is None
    assert net.conv1.weight.grad is None
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_under_inference_mode_and_with_a_frozen_backbone(method: Any) -> None:
    net = Net().eval()
    x, target = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    expected = method(net, x, target).maps
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        assert torch.equal(method(net, x.clone(), target.clone()).maps, expected)


class Reads(nn.Module):
    """Takes integers without an embedding."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.breaks = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.breaks:
            raise KeyError("mine")
        return x.mean((2, 3))


@pytest.mark.parametrize("method", [Saliency(), GradCAM("conv")], ids=lambda m: m.name)
def test_the_users_exception_comes_through_and_no_hook_stays(method: Any) -> None:
    net = Breaks()
    net.breaks = True
    with pytest.raises(KeyError, match="mine"):
        method(net, torch.randn(1, 1, 4, 4), torch.tensor([0]))
    assert not net.conv._forward_hooks
    assert net.training


def test_the_last_map_is_found_through_containers_and_in_place_relus() -> None:
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )
    assert last_map_layer(net, torch.randn(2, 1, 6, 6), torch.tensor([0, 1])) == "0.1"


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
