"""LRP against the epsilon rule written out layer by layer in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_interp.attribution import LRP, InputXGradient, Saliency, explain
from tests.attribution.nets import Text, ViT
from tests.attribution.test_gradients import TARGET, golden, small


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    return z + epsilon * torch.where(z < 0, -1.0, 1.0).double()


@torch.no_grad()
def by_hand(layers: nn.Sequential, x: Tensor, target: Tensor, epsilon: float) -> Tensor:
    """Relevance handed down through linear layers, convolutions, activations, pooling and flattening."""
    activations = [x]
    for layer in layers:
        activations.append(layer(activations[-1].clone()))
    relevance = F.one_hot(target, activations[-1].shape[1]) * activations[-1]
    for layer, a, z in zip(layers[::-1], activations[-2::-1], activations[:0:-1], strict=True):
        if isinstance(layer, nn.Linear):
            shares = relevance / stabilised(z, epsilon)
            relevance = a * torch.einsum("no,oi->ni", shares, layer.weight)
        elif isinstance(layer, nn.Conv2d):
            shares = relevance / stabilised(z, epsilon)
            back = torch.nn.grad.conv2d_input(a.shape, layer.weight, shares, layer.stride, layer.padding)
            relevance = a * back
        elif isinstance(layer, nn.Flatten):
            relevance = relevance.view_as(a)
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            relevance = a * relevance / a.sum((2, 3), keepdim=True).clamp(min=1e-300)
        elif isinstance(layer, nn.MaxPool2d):
            _, index = F.max_pool2d(a, 2, return_indices=True)
            relevance = F.max_unpool2d(relevance, index, 2)
    return relevance


def perceptron(activation: nn.Module, bias: bool = True) -> nn.Sequential:
    sizes = [nn.Linear(6, 8, bias), activation, nn.Linear(8, 5, bias), activation, nn.Linear(5, 4, bias)]
    return nn.Sequential(*sizes).double()


def convolutional() -> nn.Sequential:
    first = [nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(
        *first, nn.Conv2d(5, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    ).double()


class Clamped(nn.Module):
    """ReLU6 by another function."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_(0, 6) if self.in_place else torch.clamp(x, min=0, max=6)


ACTIVATIONS = [nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.GELU(), nn.Tanh(), nn.SiLU(inplace=True)]
ACTIVATIONS += [Clamped(False), Clamped(True)]
ACTIVATIONS += [nn.ELU(inplace=True), nn.ReLU6(), nn.Hardtanh(), nn.Mish(), nn.Hardswish(), nn.SELU(), nn.CELU()]


@pytest.mark.parametrize("epsilon", [1e-6, 0.3, 10.0])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_perceptrons(activation: nn.Module, epsilon: float) -> None:
    net, x = perceptron(activation), 9 * torch.randn(3, 6).double()
    found = LRP(epsilon)(net, x, TARGET)
    expected = by_hand(net, x, TARGET, epsilon)
    assert torch.allclose(found.maps, expected, rtol=1e-8, atol=1e-10)
    gap = expected.sum(1) - net(x).gather(1, TARGET[:, None])[:, 0]
    assert torch.allclose(found.facts["conservation_gap"], gap.float().detach(), atol=1e-5)


@pytest.mark.parametrize("epsilon", [1e-6, 0.3, 10.0])
def test_convolutional_networks(epsilon: float) -> None:
    net, x = convolutional(), 3 * torch.randn(3, 3, 12, 12).double()
    expected = by_hand(net, x, TARGET, epsilon)
    assert torch.allclose(LRP(epsilon)(net, x, TARGET).maps, expected, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(expected, by_hand(net, x, TARGET, 3.0), atol=1e-3)


def test_without_biases_all_of_the_logit_arrives() -> None:
    net, x = perceptron(nn.GELU(), bias=False), torch.randn(3, 6).double()
    found = LRP(1e-12)(net, x, TARGET)
    assert torch.allclose(found.maps.sum(1), net(x).gather(1, TARGET[:, None])[:, 0], atol=1e-9)
    assert float(found.facts["conservation_gap"].abs().max()) < 1e-6
    damped = LRP(1.0)(net, x, TARGET)
    assert float(damped.facts["conservation_gap"].abs().min()) > 1e-3


def test_of_relus_it_tends_to_input_times_gradient() -> None:
    net, x, target = golden()
    expected = InputXGradient()(net, x, target).maps
    assert torch.allclose(LRP(1e-12)(net, x, target).maps, expected, atol=1e-9)


def test_batch_normalisation_in_eval_mode_is_affine() -> None:
    net, x = small()
    assert torch.allclose(LRP(1e-12)(net, x, TARGET).maps, InputXGradient()(net, x, TARGET).maps, atol=1e-9)


def test_an_output_of_zero_hands_nothing_down() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
        net[1].weight.fill_(1.0)
    found = LRP(0.5)(net, torch.ones(1, 2).double(), torch.tensor([1])).maps
    # z = (0, 2) and a logit of 2: 2 · 2/2.5 reaches the second unit, of which 2/2.5 goes down in halves.
    assert torch.allclose(found, torch.full((1, 2), 0.64).double(), atol=1e-12)
    single = LRP(0.5)(net, torch.ones(1, 2).double(), torch.tensor([0])).maps
    assert torch.equal(single, -found)


MULTIPLIED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "F.linear": F.linear,
    "by name": lambda x, weight, bias: F.linear(input=x, weight=weight, bias=bias),
    "@": lambda x, weight, bias: x @ weight.T + bias * 0,
    "matmul": lambda x, weight, bias: torch.matmul(x, weight.T),
    "mm": lambda x, weight, bias: x.mm(weight.T),
    "addmm": lambda x, weight, bias: torch.addmm(bias, x, weight.T),
    "einsum": lambda x, weight, bias: torch.einsum("ni,oi->no", x, weight),
    "einsum of a list": lambda x, weight, bias: torch.einsum("ni,oi->no", [x, weight]),
    "conv1d": lambda x, weight, bias: F.conv1d(x[..., None], weight[..., None], bias)[..., 0],
    "torch.conv1d": lambda x, weight, bias: torch.conv1d(x[..., None], weight[..., None], bias)[..., 0],
    "transposed": lambda x, weight, bias: F.conv_transpose1d(x[..., None], weight.T[..., None], bias)[..., 0],
}


class Multiplied(nn.Module):
    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product, self.layer = product, nn.Linear(6, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize("kind", MULTIPLIED)
def test_every_way_to_multiply_by_weights(kind: str) -> None:
    net, x = Multiplied(MULTIPLIED[kind]), torch.randn(3, 6).double()
    with torch.no_grad():
        z = net(x)
    row = torch.arange(3)
    share = z[row, TARGET] / stabilised(z[row, TARGET], 0.3)
    expected = x * net.layer.weight.detach()[TARGET] * share[:, None]
    assert torch.allclose(LRP(0.3)(net, x, TARGET).maps, expected, atol=1e-12)


def test_a_product_of_activations_keeps_its_gradient() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.bmm(x[:, :, None], x[:, None, :]).flatten(1)[:, 1:3])

    net, x = Gated(), torch.randn(3, 2).double()
    found = LRP(1e-12)(net, x, TARGET)
    assert torch.allclose(found.maps, InputXGradient()(net, x, TARGET).maps, atol=1e-9)


def test_the_forward_is_not_changed_and_a_pass_is_shared_by_one_epsilon() -> None:
    net, x = convolutional(), torch.randn(3, 3, 12, 12).double()
    sizes: list[int] = []
    net.register_forward_hook(lambda _, inputs, outputs: sizes.append(len(inputs[0])))
    outputs: list[Tensor] = []
    net.register_forward_hook(lambda _, __, output: outputs.append(output.detach().clone()))
    saliency, first, second, wide = explain([Saliency(), LRP(0.1), LRP(0.1), LRP(2.0)], net, x, TARGET)
    assert len(sizes) == 3
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert torch.equal(first.maps, second.maps)
    assert (first.method, wide.method, LRP().name) == ("LRP_0.1", "LRP_2", "LRP")
    assert torch.equal(saliency.maps, Saliency()(net, x, TARGET).maps)


@pytest.mark.parametrize("net", [Text(), ViT(True)], ids=["text", "image"])
def test_transformers_get_finite_maps_and_a_gap(net: nn.Module) -> None:
    x = torch.randint(1, 20, (2, 5)) if isinstance(net, Text) else torch.randn(2, 3, 8, 8)
    found = LRP()(net.eval(), x, torch.tensor([0, 2]))
    assert found.maps.shape == x.shape
    assert bool(found.maps.isfinite().all())
    assert bool((found.facts["conservation_gap"] != 0).all())


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("inf"), float("nan")])
def test_epsilon_must_be_positive(epsilon: Any) -> None:
    with pytest.raises(ValueError, match=r"LRP\(epsilon=...\): expected a positive number"):
        LRP(epsilon)


def test_a_network_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="expected linear or convolution layers"):
        LRP()(nn.Sequential(nn.Tanh(), nn.Flatten()), torch.randn(2, 3, 2), torch.tensor([0, 1]))
