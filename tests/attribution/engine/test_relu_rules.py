"""Guided backpropagation and DeconvNet against a backward by hand, through every kind of ReLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_interp.attribution import DeconvNet, GuidedBackprop, Saliency, strongest
from tests.attribution.nets import Rectified

Rule = Callable[[Tensor, Tensor], Tensor]
RULES: dict[str, Rule] = {
    "GuidedBackprop": lambda gradient, z: gradient.clamp(min=0) * (z > 0),
    "DeconvNet": lambda gradient, z: gradient.clamp(min=0),
}
METHODS = pytest.mark.parametrize("method", [GuidedBackprop(), DeconvNet()], ids=lambda method: method.name)
RELUS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "module, used twice": nn.ReLU,
    "module in place": lambda: nn.ReLU(inplace=True),
    "F.relu": lambda: F.relu,
    "F.relu in place": lambda: lambda x: F.relu(x, inplace=True),
    "F.relu in place, by position": lambda: lambda x: F.relu(x, True),
    "F.relu by name": lambda: lambda x: F.relu(input=x),
    "torch.relu": lambda: torch.relu,
    "torch.relu_": lambda: torch.relu_,
    "method": lambda: lambda x: x.relu(),
    "method in place": lambda: lambda x: x.relu_(),
    "torch.clamp": lambda: lambda x: torch.clamp(x, min=0),
    "torch.clamp_min": lambda: lambda x: torch.clamp_min(x, 0.0),
    "clamp": lambda: lambda x: x.clamp(0),
    "clamp_ in place": lambda: lambda x: x.clamp_(min=0),
    "hardtanh without ceiling": lambda: lambda x: F.hardtanh(x, 0.0, float("inf")),
}


@torch.no_grad()
def by_hand(net: Rectified, x: Tensor, signal: Callable[[Tensor], Tensor], rule: Rule, ceiling: float) -> Tensor:
    """Transposed convolutions, unpooling and a rule at each ReLU, from a signal at the second one's output."""
    z1 = F.conv2d(x, net.conv1.weight, net.conv1.bias, padding=1)
    pooled, places = F.max_pool2d(z1.clamp(0, ceiling), 2, return_indices=True)
    z2 = F.conv2d(pooled, net.conv2.weight, net.conv2.bias, padding=1)

    def at(z: Tensor) -> Tensor:
        return torch.where(z < ceiling, z, torch.zeros_like(z))

    back = rule(signal(z2.clamp(0, ceiling)), at(z2))
    back = F.max_unpool2d(F.conv_transpose2d(back, net.conv2.weight, padding=1), places, 2)
    return F.conv_transpose2d(rule(back, at(z1)), net.conv1.weight, padding=1)


def of_class(net: Rectified, target: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda maps: (net.head.weight[target] / maps[0, 0].numel())[:, :, None, None].expand_as(maps)


class Named(nn.Module):
    """The same network with its last map as a layer."""

    def __init__(self, net: Rectified) -> None:
        super().__init__()
        self.net, self.last = net, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.net.conv1(x)), 2)
        return self.net.head(self.last(F.relu(self.net.conv2(x))).mean((2, 3)))


def given(relu: Callable[[Tensor], Tensor]) -> tuple[Rectified, Tensor, Tensor]:
    net = Rectified(relu).double()
    return net, 6 * torch.randn(3, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 2, 1])


@METHODS
@pytest.mark.parametrize("kind", RELUS)
def test_every_kind_of_relu(method: Any, kind: str) -> None:
    net, x, target = given(RELUS[kind]())
    expected = by_hand(net, x, of_class(net, target), RULES[method.name], float("inf"))
    assert torch.allclose(method(net, x, target).maps, expected, atol=1e-12)
    assert not torch.allclose(Saliency()(net, x, target).maps, expected, atol=1e-3)


@pytest.mark.parametrize("relu", [nn.ReLU6(), F.relu6, lambda x: x.clamp(0, 6)], ids=["module", "F.relu6", "clamp"])
def test_relu6_passes_below_its_ceiling(relu: Callable[[Tensor], Tensor]) -> None:
    net, x, target = given(relu)
    x = 3 * x
    expected = by_hand(net, x, of_class(net, target), RULES["GuidedBackprop"], 6.0)
    assert torch.allclose(GuidedBackprop()(net, x, target).maps, expected, atol=1e-12)
    plain = by_hand(net, x, of_class(net, target), RULES["GuidedBackprop"], float("inf"))
    assert not torch.allclose(plain, expected, atol=1e-3)  # some do reach it


@METHODS
@pytest.mark.parametrize(
    "relu",
    [lambda x: x.clamp(min=0).mul_(2), lambda x: x.clamp_(min=0).mul_(2), lambda x: F.relu6(x).mul_(2)],
    ids=["clamp", "clamp_", "F.relu6"],
)
def test_what_may_be_written_into_without_a_rule_may_be_with_one(method: Any, relu: Callable[[Tensor], Tensor]) -> None:
    net, x, target = given(relu)
    aside, _, _ = given(lambda x: 2 * relu(x.clone()).div(2))
    aside.load_state_dict(net.state_dict())
    assert torch.equal(method(net, x, target).maps, method(aside, x, target).maps)


def test_other_activations_keep_their_gradient_and_no_relu_is_an_error() -> None:
    net, x, target = given(torch.tanh)
    with pytest.raises(ValueError, match="expected ReLUs"):
        GuidedBackprop()(net, x, target)
    leaky, x, target = given(lambda x: x.clamp(min=-1.0))
    with pytest.raises(ValueError, match="expected ReLUs"):
        GuidedBackprop()(leaky, x, target)


@METHODS
def test_of_a_compiled_network(method: Any) -> None:
    net, x, target = given(nn.ReLU())
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    expected = by_hand(net, x, of_class(net, target), RULES[method.name], float("inf"))
    assert torch.allclose(method(compiled, x, target).maps, expected, atol=1e-12)


@pytest.mark.parametrize("channel", [None, 0, 4])
def test_a_feature_map_is_projected_from_its_strongest_activation_alone(channel: int | None) -> None:
    net, x, target = given(F.relu)

    def signal(maps: Tensor) -> Tensor:
        kept = torch.zeros_like(maps)
        for one, map_ in zip(kept, maps, strict=True):
            wanted = map_ if channel is None else map_[channel]
            place = (map_ == wanted.max()).nonzero()[0]
            one[tuple(place)] = wanted.max()
        return kept

    found = DeconvNet("last", channel)(Named(net), x, target).maps
    assert torch.allclose(found, by_hand(net, x, signal, RULES["DeconvNet"], float("inf")), atol=1e-12)
    plain = by_hand(net, x, signal, lambda gradient, z: gradient * (z > 0), float("inf"))
    assert not torch.allclose(found, plain, atol=1e-3)


def test_strongest_images_of_a_channel() -> None:
    net, x, _ = given(nn.ReLU())
    net.train()
    excited = net.conv1(x)[:, 3].flatten(1).max(1)
    ranked = strongest(net, [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(1))], "conv1", 3, k=2)
    assert ranked.indices.tolist() == excited.values.argsort(descending=True)[:2].tolist()
    assert torch.allclose(ranked.activations.double(), excited.values.sort(descending=True).values[:2], rtol=1e-5)
    assert net.training
    assert len(strongest(net, [(x, torch.zeros(3))], "conv1", 3).indices) == 3


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda net, x: strongest(net, [(x, x)], "nope", 0), "expected a layer of Rectified"),
        (lambda net, x: strongest(net, [(x, x)], "conv1", 5), "expected 0 to 4"),
        (lambda net, x: strongest(net, [], "conv1", 0), "not called"),
        (lambda net, x: DeconvNet("conv1", 5)(net, x, torch.zeros(3).long()), "expected 0 to 4"),
        (lambda net, x: DeconvNet(channel=1), "expected layer="),
    ],
)
def test_errors_are_named(run: Any, says: str) -> None:
    net, x, _ = given(nn.ReLU())
    with pytest.raises(ValueError, match=says):
        run(net, x)
