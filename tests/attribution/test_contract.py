"""What every method promises."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_interp.attribution import (
    CAM,
    LRP,
    DeconvNet,
    GradCAM,
    GradCAMPlusPlus,
    GuidedBackprop,
    HiResCAM,
    InputXGradient,
    IntegratedGradients,
    Occlusion,
    Saliency,
    ScoreCAM,
    SmoothGrad,
    explain,
    logit,
    select,
)
from tests.attribution.nets import Pooled, Text

ON_INPUTS = [
    Saliency(),
    InputXGradient(),
    GuidedBackprop(),
    DeconvNet(),
    DeconvNet("conv2", 1),
    IntegratedGradients(steps=3, batch_size=4),
    SmoothGrad(draws=3, batch_size=4),
    LRP(),
]
ON_POSITIONS = [
    CAM(),
    GradCAM(),
    GradCAMPlusPlus(),
    HiResCAM(),
    GradCAM("act"),
    ScoreCAM(batch_size=5),
    Occlusion(4, 2, batch_size=16),
]
EVERY = pytest.mark.parametrize("method", ON_INPUTS + ON_POSITIONS, ids=lambda method: method.name)
OF_TOKENS = [
    Saliency(),
    InputXGradient(),
    GuidedBackprop(),
    DeconvNet(),
    GradCAM(),
    GradCAMPlusPlus(),
    IntegratedGradients(steps=3, batch_size=4),
    SmoothGrad(draws=3, batch_size=4),
    LRP(),
    Occlusion(batch_size=4),
]
EVERY_OF_TOKENS = pytest.mark.parametrize("method", OF_TOKENS, ids=lambda method: method.name)


def images(n: int = 4, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, 8, 8)


def used(channels: int = 3) -> Pooled:
    """A network in train mode whose BatchNorm has seen something."""
    net = Pooled(channels)
    with torch.no_grad():
        net(3 * images(channels=channels) + 1)
    return net


CLASSES = torch.tensor([0, 1, 3, 2])


@EVERY
def test_no_map_depends_on_its_neighbours(method: Any) -> None:
    net, x = used(), images()
    together = method(net, x, CLASSES).maps
    alone = torch.cat([method(net, x[i : i + 1], CLASSES[i : i + 1]).maps for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)
    elsewhere = method(net, torch.cat([100 * images(2), x[:1]]), CLASSES[[1, 2, 0]]).maps
    assert torch.allclose(elsewhere[2], together[0], atol=1e-5)
    assert bool((together.flatten(1) != 0).any(1).all())


@EVERY_OF_TOKENS
def test_no_tokens_depend_on_their_neighbours(method: Any) -> None:
    net, ids = Text().train(), torch.randint(1, 20, (3, 5))
    together = method(net, ids, CLASSES[[0, 1, 3]])
    alone = torch.cat([method(net, ids[i : i + 1], CLASSES[[0, 1, 3]][i : i + 1]).maps for i in range(3)])
    assert together.maps.shape == (3, 5)
    assert torch.allclose(together.maps, alone, atol=1e-5)


@EVERY
@pytest.mark.usefixtures("unchecked")  # the checker itself draws from Python's generator
def test_modes_gradients_buffers_hooks_and_generators_are_as_they_were(method: Any) -> None:
    net, x, target = used(), images().requires_grad_(), CLASSES.clone()
    net.norm.eval()
    net.conv1.weight.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    given, modes = x.detach().clone(), [part.training for part in net.modules()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with torch.no_grad():
        method(net, x, target)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [part.training for part in net.modules()] == modes
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["head.weight"]
    assert bool((net.head.weight.grad == 1).all())
    assert torch.equal(x.detach(), given)
    assert x.grad is None
    assert torch.equal(target, CLASSES)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()
    assert not any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in net.modules())


@EVERY
def test_in_inference_mode_and_with_frozen_parameters(method: Any) -> None:
    net, x = used(), images()
    expected = method(net, x, CLASSES).maps
    net.requires_grad_(False)
    with torch.inference_mode():
        found = method(net, x.clone(), CLASSES.clone()).maps
        assert torch.equal(method(net, images(), lambda outputs: outputs[:, 0]).target, torch.full((4,), -1))
    assert torch.equal(found, expected)
    assert not found.requires_grad


@EVERY_OF_TOKENS
def test_tokens_in_inference_mode(method: Any) -> None:
    net, ids = Text(), torch.randint(1, 20, (3, 5))
    expected = method(net, ids, torch.tensor([0, 1, 2])).maps
    with torch.inference_mode():
        assert torch.equal(method(net, ids.clone(), torch.tensor([0, 1, 2])).maps, expected)


@EVERY
@pytest.mark.parametrize("channels", [1, 12])
def test_any_number_of_channels_and_a_batch_of_one(method: Any, channels: int) -> None:
    found = method(used(channels), images(1, channels), torch.tensor([2]))
    assert found.maps.shape == ((1, channels, 8, 8) if method in ON_INPUTS else (1, 8, 8))
    assert bool(found.maps.isfinite().all())
    assert found.target.tolist() == [2]


@EVERY
def test_under_autocast_and_in_half_precision(method: Any) -> None:
    net, x = used().eval(), images()
    expected = method(net, x, CLASSES).maps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = method(net, x, CLASSES).maps
    halved = method(net.bfloat16(), x.bfloat16(), CLASSES).maps
    assert found.dtype == halved.dtype == torch.float32
    assert float(torch.cosine_similarity(found.flatten(), expected.flatten(), 0)) > 0.9
    if not isinstance(method, SmoothGrad):  # rounded inputs are other samples, which get other draws
        assert float(torch.cosine_similarity(halved.flatten(), expected.flatten(), 0)) > 0.9


@EVERY
def test_the_users_exception_comes_through_and_no_hook_stays(method: Any) -> None:
    net = used()

    def breaks(*_: Any) -> None:
        raise KeyError("mine")

    handle = net.head.register_forward_pre_hook(breaks)
    with pytest.raises(KeyError, match="mine"):
        method(net, images(), CLASSES)
    handle.remove()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    assert all(part.training for part in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert bool((torch.relu(torch.tensor([1.0, -1.0], requires_grad=True)) == torch.tensor([1.0, 0.0])).all())


@EVERY
def test_the_same_again(method: Any) -> None:
    net, x = used(), images()
    first = method(net, x, CLASSES).maps
    torch.manual_seed(1)
    assert torch.equal(method(net, x, CLASSES).maps, first)


@EVERY
def test_a_target_may_be_a_function_of_the_outputs(method: Any) -> None:
    net, x = used(), images()
    score = getattr(method, "score", logit)
    found = method(net, x, lambda outputs: select(outputs, CLASSES, score))
    assert torch.allclose(found.maps, method(net, x, CLASSES).maps, atol=1e-6)
    assert found.target.tolist() == [-1] * 4


def test_together_they_are_what_they_are_alone() -> None:
    net, x = used(), images()
    methods = ON_INPUTS + ON_POSITIONS
    together = explain(methods, net, x, CLASSES)
    for method, found in zip(methods, together, strict=True):
        alone = method(net, x, CLASSES)
        assert (found.method, found.layer) == (alone.method, alone.layer)
        assert torch.allclose(found.maps, alone.maps, atol=1e-6)


def test_what_can_be_read_from_one_pass_takes_one() -> None:
    net, sizes = used(), []
    net.conv1.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    explain([Saliency(), InputXGradient(), CAM(), GradCAM(), GradCAMPlusPlus()], net, images(), CLASSES)
    assert sizes == [len(CLASSES)]


def test_no_gradient_is_taken_below_a_named_layer() -> None:
    net, reached = used(), []

    class Reached(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            reached.append(1)
            return gradient

    net.act.register_forward_hook(lambda *given: Reached.apply(given[2]))
    for method in (GradCAM("last"), GradCAM(), CAM()):
        method(net, images(), CLASSES)
    assert not reached
    Saliency()(net, images(), CLASSES)
    assert reached


@EVERY
def test_nan_stays_nan(method: Any) -> None:
    net, x = used(), images()
    nn.init.constant_(net.head.weight, float("nan"))
    assert bool(method(net, x, CLASSES).maps.isnan().any()) or method.name == "DeconvNet_conv2_1"
