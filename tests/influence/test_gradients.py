"""Per-sample gradients of one batched backward against autograd, one sample at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_interp import Task
from lightning_interp.capture import differentiable
from lightning_interp.influence.gradients import Trace, layers_of, verified_layers


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(self.fc(x).relu()).relu())


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.fc(x.unflatten(1, (4, 6))), inplace=True).mean(1))


def conv(layer: nn.Module, size: tuple[int, ...], channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, size), layer, nn.ReLU(inplace=True), nn.Flatten(2), Mean(), nn.Linear(channels, 3)
    )


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


NETS: dict[str, tuple[Any, int]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)), 6),
    "positions": (Tokens, 24),
    "called twice": (Reused, 6),
    "conv1d, dilated": (lambda: conv(nn.Conv1d(2, 4, 3, dilation=2, padding=1), (2, 9), 4), 18),
    "conv2d, strided": (lambda: conv(nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 5, 5), 4), 50),
    "conv2d, grouped": (lambda: conv(nn.Conv2d(4, 6, (3, 1), groups=2), (4, 4, 3), 6), 48),
    "conv2d, same, circular": (
        lambda: conv(nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"), (2, 4, 4), 4),
        32,
    ),
    "conv2d, depthwise, no bias": (lambda: conv(nn.Conv2d(4, 4, 2, groups=4, bias=False), (4, 3, 3), 4), 36),
    "conv3d": (lambda: conv(nn.Conv3d(1, 3, 2, stride=(1, 2, 1)), (1, 3, 4, 3), 3), 36),
}


@pytest.mark.parametrize("name", NETS)
def test_equals_autograd_sample_by_sample(name: str) -> None:
    make, width = NETS[name]
    net = make().double()
    x, y = torch.randn(5, width, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    layers = layers_of(net)
    with differentiable(net):
        trace = Trace(net, layers, Task(), (x, y))
        rows = trace.rows(trace.losses)
    assert set(rows) == set(layers)
    for sample in range(5):
        loss = F.cross_entropy(net(x[sample : sample + 1]), y[sample : sample + 1])
        for layer in layers:
            part = net.get_submodule(layer)
            expected = torch.autograd.grad(loss, list(part.parameters()), retain_graph=True)
            flat = torch.cat([expected[0].flatten(1), *(g[:, None] for g in expected[1:])], dim=1)
            found = rows[layer].gradients()[sample].flatten(0, 1)
            assert torch.allclose(found, flat, atol=1e-12), layer


def test_blocks_cover_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(4, 3)
    monkeypatch.setattr("lightning_interp.influence.gradients.LARGEST_BLOCK", 2 * 15)
    trace = Trace(net, [""], Task(), (torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])))
    rows = trace.rows(trace.losses)[""]
    pieces = [block.gradients() for _, block in rows.blocks()]
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    assert torch.equal(torch.cat(pieces), rows.gradients())


class Sneaky(nn.Module):
    """A weight used outside its layer, a tied weight, a sequence-first layer, a frozen one and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.first, self.frozen, self.unused = (nn.Linear(4, 4) for _ in range(4))
        self.tied, self.good = nn.Linear(4, 4), nn.Linear(4, 3)
        self.also = nn.Linear(4, 4)
        self.also.weight = self.tied.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(x) + F.linear(x, self.twice.weight)
        x = self.first(torch.stack([x, x * 2], dim=0)).sum(0)
        x = self.also(self.tied(self.frozen(x)))
        return self.good(x)


def test_only_layers_whose_gradient_is_right_are_covered() -> None:
    net = Sneaky()
    batch = torch.randn(3, 4), torch.tensor([0, 1, 2])
    candidates = layers_of(net)
    assert candidates == ["twice", "first", "unused", "good"]
    assert verified_layers(net, candidates, Task(), batch) == ["good"]
