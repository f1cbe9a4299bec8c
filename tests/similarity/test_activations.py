"""Features of many batches, in bounded memory, equal those taken at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_interp.similarity import CKA, prepare
from lightning_interp.similarity.activations import find_activations, representations
from lightning_interp.similarity.pooling import Pooling

FLAT = Pooling(tokens="flatten")


class Twice(nn.Module):
    """A layer called twice, an in-place ReLU, a tuple output, and one that does not keep rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.gru = nn.GRU(8, 4, batch_first=True)
        self.total = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(self.act(self.conv(x))))
        self.total(x.sum())
        return self.gru(x.flatten(2))[0].mean(1)


@pytest.fixture
def net() -> Twice:
    return Twice().eval()


def batches(n: int = 20) -> list[Tensor]:
    return list(torch.randn(n, 2, 2, 4).split(6))


def test_widths(net: Twice) -> None:
    found = find_activations(net, net, [torch.randn(5, 2, 2, 4), torch.randn(4, 2, 2, 4)], FLAT)
    widths = {found.label(call): width for call, width in found.widths().items()}
    assert widths == {"conv#0": 16, "conv#1": 16, "act#0": 16, "act#1": 16, "gru": 8, "output": 4}


@pytest.mark.parametrize("columns_per_pass", [3, 17, 10_000])
@pytest.mark.parametrize("n", [10, 40])
def test_equals_all_at_once(net: Twice, columns_per_pass: int, n: int) -> None:
    data = batches(n)
    watched = find_activations(net, net, [data[0], data[0][:5]], FLAT)
    found = representations(net, net, data, watched, n, bytes_per_pass=columns_per_pass * 4 * n)
    whole = torch.cat(data)
    first = net.conv(whole)
    second = net.conv(first.relu())
    expected = {
        "conv#0": first,
        "conv#1": second,
        "act#0": first.relu(),
        "act#1": second.relu(),
        "gru": net.gru(second.relu().flatten(2))[0],
        "output": net(whole),
    }
    assert list(found) == list(expected)
    for layer, features in expected.items():
        whole_layer = prepare(features.detach().flatten(1))
        assert found[layer].width == features[0].numel()
        assert float(CKA().between(found[layer], whole_layer)) == pytest.approx(1, abs=1e-6)
        assert torch.allclose(found[layer].s[:5], whole_layer.s[:5], rtol=1e-4)


def test_not_a_number_is_named(net: Twice) -> None:
    nn.init.constant_(net.conv.bias, torch.nan)
    data = batches()
    with pytest.raises(ValueError, match="conv#0: activations hold NaN"):
        representations(net, net, data, find_activations(net, net, [data[0], data[0][:5]]).of(["conv"]), 20)


def test_a_first_batch_unlike_the_rest_costs_no_digits() -> None:
    """All batches but the first are 1,000 standard deviations away from it."""
    net = nn.Sequential(nn.Identity())
    features = torch.randn(60, 300)
    features[6:] += 1000
    watched = find_activations(net, net, [features[:3], features[:2]], FLAT).of(["0"])
    (found,) = representations(net, net, list(features.split(6)), watched, 60, "gram").values()
    centred = features.double() - features.double().mean(0)
    exact = centred @ centred.T
    assert torch.allclose(found.gram, exact, atol=2e-6 * float(exact.abs().max()))


def test_a_wrong_number_of_samples_is_named(net: Twice) -> None:
    data = batches()
    with pytest.raises(ValueError, match="expected 12 samples, got 20"):
        representations(net, net, data, find_activations(net, net, [data[0], data[0][:5]], FLAT), 12, "gram")
