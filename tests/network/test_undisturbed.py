"""Watching leaves no trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_interp.network.layers import default_layers, match_layers
from lightning_interp.network.undisturbed import capture, differentiable, hooked, undisturbed


class Restless(nn.Module):
    """Changes a buffer in place, replaces another, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.last = x.detach()[0]
        return self.fc(x) + torch.rand(2) + np.random.rand() + random.random()


def test_everything_is_put_back_on_every_way_out() -> None:
    net = Restless()
    last = net.last
    net.fc.weight.grad = torch.ones(2, 2)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    def disturb() -> None:
        with undisturbed(net):
            assert not net.training
            net(torch.ones(1, 2))
            net.fc.weight.requires_grad_(False)
            net.fc.weight.grad = None
            net.fc.train()
            raise KeyError

    with pytest.raises(KeyError):
        disturb()
    assert net.training
    assert net.fc.training
    assert float(net.count) == 0
    assert net.last is last
    assert bool((net.last == 0).all())
    assert net.fc.weight.requires_grad
    assert bool((net.fc.weight.grad == 1).all())
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()


def test_gradients_flow_where_the_caller_switched_them_off() -> None:
    net = nn.LSTM(2, 3)
    with torch.inference_mode(), differentiable(net):
        x = torch.ones(1, 1, 2, requires_grad=True)
        assert torch.autograd.grad(net(x)[0].sum(), x)[0].abs().sum() > 0


def test_capture_keeps_calls_in_order_and_removes_its_hooks() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with capture(net, ["2", "0"], lambda _, call, out: (call, out.clone())) as seen:
        net(torch.ones(3, 2))
        net[0](torch.zeros(1, 2))
    assert list(seen) == ["0", "2"]
    assert [call for call, _ in seen["0"]] == [0, 1]
    assert not any(part._forward_hooks for part in net.modules())


def test_hooks_are_removed_when_a_layer_is_unknown() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(AttributeError), hooked(net, ["0", "nope"], lambda *_: None):
        pass
    assert not net[0]._forward_hooks


def test_compiled_modules_run_eagerly_so_that_hooks_fire() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    net.compile(backend="eager")
    net(torch.ones(1, 2))
    with undisturbed(net), capture(net, ["0"], lambda *_: 1) as seen:
        net(torch.ones(1, 2))
    assert seen == {"0": [1]}


def test_patterns() -> None:
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(1, 1, 1))
    net.add_module("body", nn.Sequential(nn.Linear(1, 1), nn.ReLU()))
    assert match_layers(net, ["body*"]) == ["body", "body.0", "body.1"]
    assert match_layers(net, ["body.0", "stem"]) == ["stem", "body.0"]
    with pytest.raises(ValueError, match=r"layers: 'stam' names no layer of Sequential; did you mean stem\?"):
        match_layers(net, ["stam"])
    with pytest.raises(ValueError, match=r"there are stem, body"):
        match_layers(net, ["xyzxyz"])


def test_default_layers() -> None:
    parts = [nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.ReLU()) for _ in range(40)]
    net = nn.Sequential(*parts)
    called = {name: 1 for name, _ in net.named_modules() if name}
    chosen = default_layers(net, called)
    assert len(chosen) == 24
    assert (chosen[0], chosen[-1]) == ("0.0", "39.0")
    assert all(name.endswith(".0") for name in chosen)
    assert default_layers(nn.Sequential(nn.ReLU()), {"0": 1}) == ["0"]
