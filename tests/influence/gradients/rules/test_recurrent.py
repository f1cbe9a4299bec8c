"""Recurrent layers written out: the same outputs as torch's own, and autograd's gradients for each sample."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_interp.data.batch import tensors
from lightning_interp.influence.gradients.rules import RULES, LayerCall
from tests.influence.nets import per_sample

LABELS = torch.tensor([0, 1, 2, 1, 0])


class Sequence(nn.Module):
    """A recurrent layer over four steps; its initial state comes from the input where `start` is its width."""

    def __init__(self, layer: nn.RNNBase, width: int, start: int = 0) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(width, 3)
        self.start = nn.Linear(20, start) if start else None

    def forward(self, x: Tensor) -> Tensor:
        steps = x.unflatten(1, (4, 5))
        steps = steps if self.layer.batch_first else steps.transpose(0, 1)
        if self.start is None:
            output, last = self.layer(steps)
        else:
            state = self.start(x).tanh()[None]
            output, last = self.layer(steps, (state, 2 * state) if isinstance(self.layer, nn.LSTM) else state)
        ends = sum(part.sum((0, 2)) for part in (last if isinstance(last, tuple) else (last,)))
        return self.out(output.mean(1 if self.layer.batch_first else 0)) + ends.sin()[:, None] * x[:, :3]


class Packed(nn.Module):
    """A recurrent layer over sequences of different lengths, which follow from the first feature."""

    def __init__(self, layer: nn.RNNBase, width: int, use_outputs: bool) -> None:
        super().__init__()
        self.layer, self.out, self.use_outputs = layer, nn.Linear(width, 3), use_outputs

    def forward(self, x: Tensor) -> Tensor:
        lengths = (1 + 3 * x[:, 0].detach().sigmoid()).round().long()
        steps = pack_padded_sequence(x.unflatten(1, (4, 5)), lengths, batch_first=True, enforce_sorted=False)
        output, last = self.layer(steps)
        if self.use_outputs:
            return self.out(pad_packed_sequence(output, batch_first=True)[0].sum(1))
        state = last[0] if isinstance(last, tuple) else last
        return self.out(state.transpose(0, 1).flatten(1))


class Cells(nn.Module):
    """A cell called step by step, at first without a state."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell, self.out = cell, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unflatten(1, (4, 5)).unbind(1):
            state = self.cell(step, state)
        return self.out(state[0] if isinstance(state, tuple) else state)


LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "rnn": lambda: nn.RNN(5, 4, batch_first=True),
    "rnn, relu, no bias": lambda: nn.RNN(5, 4, nonlinearity="relu", bias=False),
    "lstm": lambda: nn.LSTM(5, 4, batch_first=True),
    "lstm, sequence first": lambda: nn.LSTM(5, 4),
    "lstm, deep, both ways, projected": lambda: nn.LSTM(5, 4, 2, bidirectional=True, proj_size=2, dropout=0.5),
    "gru": lambda: nn.GRU(5, 4),
    "gru, deep, both ways": lambda: nn.GRU(5, 4, 2, bidirectional=True, batch_first=True),
    "gru, no bias": lambda: nn.GRU(5, 4, bias=False, batch_first=True),
}


def width(layer: nn.RNNBase) -> int:
    return (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)


def plain(make: Callable[[], nn.RNNBase]) -> Sequence:
    layer = make()
    return Sequence(layer, width(layer))


NETS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(plain, make) for name, make in LAYERS.items()},
    "rnn from a state": lambda: Sequence(nn.RNN(5, 4), 4, 4),
    "lstm from a state": lambda: Sequence(nn.LSTM(5, 4, batch_first=True), 4, 4),
    "gru from a state": lambda: Sequence(nn.GRU(5, 4, batch_first=True), 4, 4),
    "rnn, packed": lambda: Packed(nn.RNN(5, 4), 4, use_outputs=True),
    "lstm, packed, deep, both ways": lambda: Packed(nn.LSTM(5, 4, 2, bidirectional=True), 16, use_outputs=False),
    "gru, packed, both ways": lambda: Packed(nn.GRU(5, 4, bidirectional=True), 8, use_outputs=True),
    "rnn cell": lambda: Cells(nn.RNNCell(5, 4)),
    "rnn cell, relu": lambda: Cells(nn.RNNCell(5, 4, nonlinearity="relu", bias=False)),
    "lstm cell": lambda: Cells(nn.LSTMCell(5, 4)),
    "gru cell": lambda: Cells(nn.GRUCell(5, 4)),
}


@pytest.mark.parametrize("name", NETS)
def test_equals_autograd_sample_by_sample(name: str) -> None:
    net = NETS[name]().double()
    coverage, worst = per_sample(net, (torch.randn(5, 20, dtype=torch.float64), LABELS))
    assert worst < 1e-10
    assert coverage.left_out == {}
    assert coverage.fallback is None
    assert coverage.size == sum(p.numel() for p in net.parameters())


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", ["rnn", "lstm, deep, both ways, projected", "gru, packed, both ways", "gru cell"])
def test_single_precision_is_right_to_five_digits(name: str) -> None:
    coverage, worst = per_sample(NETS[name](), (torch.randn(5, 20), LABELS))
    assert worst < 1e-5
    assert coverage.left_out == {}


def differ(layer: nn.Module, *args: Any, axis: int = 0) -> float:
    """How far the output that goes on is from the layer's own; their structures must be equal."""
    layer.eval()
    output = layer(*args)
    found, uses = RULES[type(layer)](LayerCall(layer, args, {}, output, axis))
    assert uses
    assert type(found) is type(output)
    ours, theirs = list(tensors(found)), list(tensors(output))
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("lengths", [None, [2, 4, 1]])
def test_the_output_is_the_layers_own(name: str, lengths: list[int] | None) -> None:
    layer = LAYERS[name]().double()
    first = layer.batch_first
    steps: Any = torch.randn(3, 4, 5, dtype=torch.float64) if first else torch.randn(4, 3, 5, dtype=torch.float64)
    if lengths is not None:
        steps = pack_padded_sequence(steps, torch.tensor(lengths), first, enforce_sorted=False)
    depth = layer.num_layers * (2 if layer.bidirectional else 1)
    state = torch.randn(depth, 3, layer.proj_size or 4, dtype=torch.float64)
    start = (state, torch.randn(depth, 3, 4, dtype=torch.float64)) if isinstance(layer, nn.LSTM) else state
    assert differ(layer, steps, axis=0 if first else 1) < 1e-12
    assert differ(layer, steps, start, axis=0 if first else 1) < 1e-12


def test_the_output_is_the_cells_own() -> None:
    given, state = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    for cell in (nn.RNNCell(5, 4), nn.RNNCell(5, 4, nonlinearity="relu"), nn.GRUCell(5, 4, bias=False)):
        assert differ(cell.double(), given) < 1e-12
        assert differ(cell, given, state) < 1e-12
    assert differ(nn.LSTMCell(5, 4).double(), given, (state, 2 * state)) < 1e-12


class Sorted(nn.Module):
    """Sorts the samples itself before it packs them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.GRU(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        lengths, order = (1 + 3 * x[:, 0].detach().sigmoid()).round().long().sort(descending=True)
        steps: PackedSequence = pack_padded_sequence(x[order].unflatten(1, (4, 5)), lengths, batch_first=True)
        return self.out(self.layer(steps)[1][0][order.argsort()])


def test_sequences_in_an_order_of_their_own_are_differentiated_one_by_one() -> None:
    x = torch.randn(5, 20, dtype=torch.float64)
    x[:, 0] = torch.tensor([3.0, 1, -3, 2, 0])
    coverage, worst = per_sample(Sorted().double(), (x, LABELS))
    assert worst < 1e-10
    assert coverage.left_out == {}
    assert coverage.fallback is not None
    assert {name for block in coverage.fallback.blocks for name in block.parameters} == {
        f"layer.{kind}_{of}_l0" for kind in ("weight", "bias") for of in ("ih", "hh")
    }


class Starts(nn.Module):
    """A learned initial state, which no rule covers and torch.func cannot reach through a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.layer, self.out = nn.Parameter(torch.randn(1, 1, 4)), nn.GRU(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.unflatten(1, (4, 5)).transpose(0, 1)
        return self.out(self.layer(steps, self.start.expand(1, len(x), 4).contiguous())[1][0])


def test_a_learned_initial_state_is_covered() -> None:
    coverage, worst = per_sample(Starts().double(), (torch.randn(5, 20, dtype=torch.float64), LABELS))
    assert worst < 1e-10
    assert coverage.left_out == {}
    assert coverage.fallback is not None
    assert [block.name for block in coverage.fallback.blocks] == ["start"]


def test_samples_along_the_recurrence_are_not_taken_for_samples() -> None:
    layer = nn.GRU(5, 4, batch_first=True)
    output = layer(torch.randn(3, 3, 5))
    assert RULES[nn.GRU](LayerCall(layer, (torch.randn(3, 3, 5),), {}, output, 1)) == (output, [])
