"""Gradient methods and occlusion against naive transcriptions in float64, and the golden maps."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_interp.attribution import (
    DeconvNet,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    Occlusion,
    Saliency,
    SmoothGrad,
    log_probability,
    probability,
)
from tests.attribution.nets import Pooled

GOLDEN = dict(np.load(Path(__file__).parents[1] / "data" / "golden_attribution.npz"))
TARGET = torch.tensor([0, 3, 1])


def golden() -> tuple[nn.Module, Tensor, Tensor]:
    convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU()]
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).double()
    net.load_state_dict({k.removeprefix("weights/"): torch.tensor(v) for k, v in GOLDEN.items() if "/" in k})
    return net, torch.tensor(GOLDEN["inputs"]), torch.tensor(GOLDEN["target"])


def small() -> tuple[Pooled, Tensor]:
    net = Pooled().double()
    with torch.no_grad():
        net(torch.randn(8, 3, 8, 8).double())
    return net.eval(), torch.randn(3, 3, 8, 8, dtype=torch.float64)


def gradient(net: nn.Module, x: Tensor, target: int) -> Tensor:
    x = x[None].clone().requires_grad_()
    return torch.autograd.grad(net(x.clone())[0, target], x)[0][0]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (Saliency(), "gradient_of_logit"),
        (Saliency(probability), "gradient_of_probability"),
        (InputXGradient(), "input_x_gradient"),
        (GuidedBackprop(), "guided_backprop"),
        (DeconvNet(), "deconvnet"),
        (IntegratedGradients(), "integrated_gradients_midpoint_32_zero_baseline"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_golden(method: Any, name: str) -> None:
    found = method(*golden())
    assert torch.allclose(found.maps, torch.tensor(GOLDEN[name]), atol=1e-12)
    assert found.layer is None


def test_golden_occlusion() -> None:
    maps = Occlusion(8, 4)(*golden()).maps
    expected = torch.tensor(GOLDEN["occlusion_window8_stride4_zero"])
    assert maps.shape == (4, 32, 32)
    assert torch.allclose(maps[:, None].expand_as(expected), expected, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("baseline", [0.0, (0.1, -0.2, 0.3), "blur"])
def test_integrated_gradients(batch_size: int, baseline: Any) -> None:
    net, x = small()
    blur = nn.AvgPool2d(3, 1, 1)
    start = blur(x) if baseline == "blur" else torch.tensor(baseline).double().view(-1, 1, 1).expand_as(x[0])
    start = start.expand_as(x)
    expected = torch.zeros_like(x)
    for i in range(3):
        for k in range(5):
            point = start[i] + (k + 0.5) / 5 * (x[i] - start[i])
            expected[i] += (x[i] - start[i]) * gradient(net, point, int(TARGET[i])) / 5
    given = blur if baseline == "blur" else baseline
    found = IntegratedGradients(5, given, batch_size=batch_size)(net, x, TARGET)
    assert torch.allclose(found.maps, expected, atol=1e-7)  # a baseline in float32
    with torch.no_grad():
        rise = (net(x) - net(start)).gather(1, TARGET[:, None])[:, 0]
    gap = expected.flatten(1).sum(1) - rise
    assert torch.allclose(found.facts["completeness_gap"].double(), gap, atol=1e-5)


def test_more_steps_close_the_gap() -> None:
    net, x = small()
    coarse, fine = (IntegratedGradients(steps)(net, x, TARGET).facts["completeness_gap"] for steps in (2, 256))
    assert float(fine.abs().max()) < float(coarse.abs().max()) / 10


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_smooth_grad(batch_size: int) -> None:
    net, x = small()
    expected = torch.zeros_like(x)
    for i, sample in enumerate(x):
        seed = int.from_bytes(hashlib.sha256(sample.numpy().tobytes()).digest()[:7], "big")
        for k in range(4):
            noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(seed + k)).double()
            noisy = sample + 0.2 * (sample.max() - sample.min()) * noise
            expected[i] += gradient(net, noisy, int(TARGET[i])) / 4
    found = SmoothGrad(4, 0.2, batch_size=batch_size)(net, x, TARGET)
    assert torch.allclose(found.maps, expected, atol=1e-12)


def test_smooth_grad_of_a_linear_network_is_its_gradient() -> None:
    net = nn.Linear(6, 4).double()
    found = SmoothGrad()(net, torch.randn(3, 6).double(), TARGET)
    assert torch.allclose(found.maps, net.weight.detach()[TARGET], atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 7), (5, 11), (3, 2)])
@pytest.mark.parametrize(("window", "stride"), [(4, 2), (3, 3), (5, 2), (1, 1)])
def test_occlusion_of_odd_sizes(height: int, width: int, window: int, stride: int) -> None:
    net, _ = small()
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected, times = torch.zeros(2, height, width).double(), torch.zeros(height, width)

    def starts(length: int) -> list[int]:
        found = [0]
        while found[-1] + window < length:
            found.append(found[-1] + stride)
        return [start for start in found if start < length]

    with torch.no_grad():
        for top in starts(height):
            for left in starts(width):
                place = (slice(top, top + window), slice(left, left + window))
                covered = x.clone()
                covered[:, :, place[0], place[1]] = 0.5
                fall = (net(x) - net(covered)).gather(1, TARGET[:2, None])[:, 0]
                expected[:, place[0], place[1]] += fall[:, None, None]
                times[place] += 1
    assert bool((times > 0).all())
    found = Occlusion(window, stride, 0.5, batch_size=7)(net, x, TARGET[:2])
    assert torch.allclose(found.maps, expected / times, atol=1e-12)


def test_occlusion_of_columns_is_the_weight_times_the_distance_of_a_linear_network() -> None:
    net, x = nn.Linear(6, 4).double(), torch.randn(3, 6).double()
    mean = x.mean(0)
    found = Occlusion(baseline=mean)(net, x, TARGET)
    assert torch.allclose(found.maps, net.weight.detach()[TARGET] * (x - mean), atol=1e-12)


@pytest.mark.parametrize("method", [Saliency, InputXGradient, IntegratedGradients, SmoothGrad, Occlusion])
def test_the_score_is_named_and_changes_the_map(method: Any) -> None:
    net, x = small()
    plain, other = method()(net, x, TARGET), method(score=log_probability)(net, x, TARGET)
    assert other.method == plain.method + "_of_log_probability"
    assert not torch.allclose(plain.maps, other.maps, atol=1e-4)


def test_a_single_logit_speaks_for_class_1_and_against_class_0() -> None:
    net, x = nn.Linear(6, 1), torch.randn(2, 6)
    maps = Saliency()(net, x, torch.tensor([1, 0])).maps
    assert torch.equal(maps[0], net.weight.detach()[0])
    assert torch.equal(maps[1], -net.weight.detach()[0])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: IntegratedGradients(steps=0), "steps=.*from 1"),
        (lambda: SmoothGrad(draws=2.5), "draws=.*whole"),
        (lambda: SmoothGrad(noise=0.0), "positive share"),
        (lambda: Occlusion(window=True), "window=.*whole"),
        (lambda: Occlusion(2, 3), "at most the window"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_arguments_are_checked(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_a_baseline_that_does_not_fit_is_named() -> None:
    net, x = small()
    with pytest.raises(ValueError, match="baseline: expected a number"):
        IntegratedGradients(baseline=(0.0, 1.0))(net, x, TARGET)
