"""A layer is drawn anew, seen by maps that depend on it, and put back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from lightning_interp.attribution import Edges, GradCAM, Saliency, last_weights, reinitialized, sanity_similarity
from tests.models import Net

TARGET = torch.tensor([0, 1, 2])


class Own(nn.Module):
    """A layer with weights and no `reset_parameters`, which contains another."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(500) * 3 + 7)
        self.shift = nn.Parameter(torch.ones(500))
        self.inner = nn.Linear(500, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale + self.shift)


class Backwards(nn.Module):
    """Registers its layers in another order than it calls them; the root has a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.bias = nn.Parameter(torch.zeros(4))
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.unused = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) + self.bias)


def everything(net: nn.Module) -> dict[str, Any]:
    return {
        **{f"{name} values": value.clone() for name, value in net.state_dict().items()},
        **{f"{name} grad": p.grad for name, p in net.named_parameters()},
        **{f"{name} asked": p.requires_grad for name, p in net.named_parameters()},
        **{f"{name} mode": part.training for name, part in net.named_modules()},
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], Tensor) else a[key] == b[key] for key in a
    )


def draws() -> list[float]:
    return [float(torch.rand(())), float(np.random.rand()), random.random()]


def seed_all() -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)


@pytest.mark.parametrize("layer", ["conv2", "norm", "head"])
def test_one_layer_changes_and_all_comes_back(layer: str) -> None:
    net = Net().train()
    with torch.no_grad():
        net.norm.weight.normal_()
        net.norm.running_mean.normal_()
    net.head.weight.requires_grad_(False)
    net(torch.randn(4, 1, 8, 8)).sum().backward()
    before = everything(net)
    seed_all()
    expected = draws()
    seed_all()
    with reinitialized(net, layer):
        inside = everything(net)
        assert draws() == expected
    changed = {key for key in before if not same({key: before[key]}, {key: inside[key]})}
    assert changed <= {f"{layer}.weight values", f"{layer}.bias values"}
    assert f"{layer}.weight values" in changed
    assert same(before, everything(net))


def test_it_comes_back_when_the_body_or_the_draw_fails() -> None:
    net = Net()
    before = everything(net)

    def body() -> None:
        with reinitialized(net, "head"):
            assert not same(before, everything(net))
            raise KeyError("user")

    with pytest.raises(KeyError, match="user"):
        body()
    assert same(before, everything(net))

    def half(self: nn.Linear = net.head) -> None:
        nn.init.zeros_(self.weight)
        raise KeyError("half")

    net.head.reset_parameters = half
    with pytest.raises(KeyError, match="half"), reinitialized(net, "head"):
        pass
    assert same(before, everything(net))


def test_nan_weights_come_back_too() -> None:
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight[0, 0] = torch.nan
    before = net.weight.detach().clone().view(torch.int32)
    with reinitialized(net):
        assert bool(net.weight.isfinite().all())
    assert torch.equal(net.weight.detach().view(torch.int32), before)


def test_draws_are_the_layers_own_and_seeded() -> None:
    net = Net()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(int(torch.randint(1000, ())))
        with reinitialized(net, "head", seed):
            found.append(net.head.weight.detach().clone())
    torch.manual_seed(0)
    assert torch.equal(found[0], nn.Linear(6, 3).weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_layer_without_a_reset_keeps_mean_and_spread() -> None:
    net = nn.Sequential(nn.Linear(3, 500), Own())
    scale, inner = (p.detach().clone() for p in (net[1].scale, net[1].inner.weight))
    with reinitialized(net, "1"):
        now = net[1].scale.detach()
        assert abs(float(np.corrcoef(now, scale)[0, 1])) < 0.2
        assert float(now.mean()) == pytest.approx(float(scale.mean()), abs=0.5)
        assert float(now.std()) == pytest.approx(float(scale.std()), rel=0.15)
        assert torch.equal(net[1].shift, torch.ones(500))
        assert not torch.equal(net[1].inner.weight, inner)


def test_the_last_weights_are_found_by_the_calls() -> None:
    assert last_weights(Backwards(), torch.randn(2, 3)) == "head"
    assert last_weights(nn.Sequential(Backwards(), nn.ReLU()), torch.randn(2, 3)) == "0.head"
    assert last_weights(nn.Linear(3, 2), torch.randn(2, 3)) == ""
    net = Backwards()
    unused, head = net.unused.weight.detach().clone(), net.head.weight.detach().clone()
    with reinitialized(net):  # without a forward it can only be the last that is registered
        assert torch.equal(net.head.weight, head)
        assert not torch.equal(net.unused.weight, unused)


def test_similarity_equals_scipys_of_absolute_values() -> None:
    net, x = Net(), torch.randn(3, 1, 8, 8)
    before = Saliency()(net, x, TARGET).maps
    with reinitialized(net, "conv2", seed=4):
        after = Saliency()(net, x, TARGET).maps
    expected = [
        scipy.stats.spearmanr(a.abs().flatten(), b.abs().flatten()).statistic
        for a, b in zip(before, after, strict=True)
    ]
    found = sanity_similarity(Saliency(), net, x, TARGET, layer="conv2", seed=4)
    assert found.tolist() == pytest.approx(expected)
    assert bool((found < 0.95).all())


def test_a_map_that_looks_at_no_network_stays() -> None:
    net, x = Net(), torch.randn(3, 1, 8, 8)
    before = everything(net)
    assert sanity_similarity(Edges(), net, x, TARGET).tolist() == pytest.approx([1, 1, 1])
    with torch.inference_mode():
        found = sanity_similarity(Saliency(), net, x.clone(), TARGET.clone())
    assert found.tolist() == sanity_similarity(Saliency(), net, x, TARGET).tolist()
    assert same(before, everything(net))


def test_a_dead_map_has_no_similarity() -> None:
    net, x = Net(), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        net.head.weight.zero_()
    assert bool(sanity_similarity(GradCAM(layer="conv2"), net, x, TARGET).isnan().all())


def test_a_layer_without_weights_is_named() -> None:
    for layer in ("act", "nothing"):
        with (
            pytest.raises(ValueError, match=f"layer: expected the name of a module with parameters, got '{layer}'"),
            reinitialized(Net(), layer),
        ):
            pass
    with pytest.raises(ValueError, match="model: expected a module with parameters in its forward"):
        last_weights(nn.Flatten(), torch.randn(2, 3, 4))


def test_signs_do_not_count() -> None:
    net, x = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(3, 12)
    before = Saliency()(net, x, TARGET).maps
    with reinitialized(net):
        after = Saliency()(net, x, TARGET).maps
    expected = [scipy.stats.spearmanr(a.abs(), b.abs()).statistic for a, b in zip(before, after, strict=True)]
    assert sanity_similarity(Saliency(), net, x, TARGET).tolist() == pytest.approx(expected)


def test_padding_does_not_count() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 4), nn.Linear(4, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head((self.embed(input_ids).tanh() * attention_mask[..., None]).sum(1))

    torch.manual_seed(0)
    net, ids, target = Words(), torch.randint(1, 20, (3, 6)), torch.tensor([0, 1, 2])
    padded = torch.cat([ids, torch.zeros(3, 20, dtype=torch.long)], 1)
    mask = (torch.arange(26) < 6).expand(3, 26)
    short = {"input_ids": ids, "attention_mask": mask[:, :6]}
    long = {"input_ids": padded, "attention_mask": mask}
    expected = sanity_similarity(Saliency(), net, short, target)
    assert torch.allclose(sanity_similarity(Saliency(), net, long, target), expected, atol=1e-9)
