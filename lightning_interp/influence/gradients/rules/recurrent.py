"""Recurrent layers and cells: linear maps of the input and of the state, written out step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_interp.data.batch import at_least_float32
from lightning_interp.influence.gradients.rules.call import LayerCall, ParameterUse, trained

State = tuple[Tensor, ...]
Map = Callable[[Tensor], Tensor]


def recurrent(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the factors of an `nn.RNN`, `nn.LSTM` or `nn.GRU`: all its layers and directions, every step.

    Sequences packed with `enforce_sorted=True` have none here: who sorted them, and from which order, is not known.
    """
    given = call.argument(0, "input")
    if isinstance(given, PackedSequence):
        if given.sorted_indices is None:
            return call.output, []
        steps, real = _unpacked(given)
        outputs, last, uses = _stacked(call, steps, real)
        return (_packed(outputs, given), last), uses
    own = 0 if call.layer.batch_first else 1
    if given.ndim != 3 or call.axis != own:
        return call.output, []
    outputs, last, uses = _stacked(call, given.transpose(0, 1 - own), None)
    return (outputs.transpose(0, 1 - own), last), uses


def cell(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the factors of an `nn.RNNCell`, `nn.LSTMCell` or `nn.GRUCell`: one step."""
    given = call.argument(0, "input")
    if given.ndim != 2 or call.axis != 0:
        return call.output, []
    start = call.argument(1, "hx")
    scan = _Scan(call.layer, "")
    state = _states(start) if start is not None else scan.zeros(given)
    _, state = scan(given[None], state, None)
    return state if isinstance(call.output, tuple) else state[0], scan.uses


def _stacked(call: LayerCall, steps: Tensor, real: Tensor | None) -> tuple[Tensor, Any, list[ParameterUse]]:
    """Run every layer on `(t, n, i)`; `real` says which positions are no padding, `(t, n, 1)`."""
    layer, start = call.layer, call.argument(1, "hx")
    ways = ("", "_reverse") if layer.bidirectional else ("",)
    lasts: list[State] = []
    uses: list[ParameterUse] = []
    for depth in range(layer.num_layers):
        outputs = []
        for way in ways:
            scan = _Scan(layer, f"_l{depth}{way}")
            state = tuple(s[len(lasts)] for s in _states(start)) if start is not None else scan.zeros(steps[0])
            found, last = scan(steps, state, real, backwards=bool(way))
            outputs.append(found)
            lasts.append(last)
            uses += scan.uses
        steps = torch.cat(outputs, dim=-1)
    last = tuple(map(torch.stack, zip(*lasts, strict=True)))
    return steps, last if isinstance(layer, nn.LSTM) else last[0], uses


class _Scan:
    """One layer in one direction.

    Args:
        layer: whose parameters they are.
        suffix: at the end of their names.
    """

    def __init__(self, layer: Any, suffix: str) -> None:
        self._layer, self._suffix = layer, suffix
        self._step = _step_of(layer)
        self.uses: list[ParameterUse] = []

    def __call__(
        self, steps: Tensor, state: State, real: Tensor | None, backwards: bool = False
    ) -> tuple[Tensor, State]:
        """Return the outputs `(t, n, o)` and the last state; at padding the state stays as it was."""
        inside = _Repeated(self._layer, f"_ih{self._suffix}", 1)
        across = _Repeated(self._layer, f"_hh{self._suffix}", len(steps))
        down = _Repeated(self._layer, f"_hr{self._suffix}", len(steps))
        maps, found = inside(steps).unbind(), []
        order = range(len(steps))[:: -1 if backwards else 1]
        for t in order:
            fresh = self._step(maps[t], state, across, down)
            if real is not None:
                fresh = tuple(torch.where(real[t], new, old) for new, old in zip(fresh, state, strict=True))
            state = fresh
            found.append(state[0])
        self.uses += [use for part in (inside, across, down) for use in part.uses]
        return torch.stack([found[t] for t in order]), state

    def zeros(self, given: Tensor) -> State:
        """Return the state a layer starts from when none is given; its input is `(n, i)`."""
        hidden = self._layer.hidden_size
        widths = (getattr(self._layer, "proj_size", 0) or hidden, hidden)
        count = 2 if isinstance(self._layer, (nn.LSTM, nn.LSTMCell)) else 1
        return tuple(given.new_zeros(len(given), width) for width in widths[:count])


class _Repeated:
    """A linear map applied again and again: zeros added to what comes out are the node whose gradient is asked.

    Args:
        layer: whose parameters they are.
        names: what follows "weight" and "bias" in their names.
        times: how often it is applied.
    """

    def __init__(self, layer: Any, names: str, times: int) -> None:
        self._layer, self._times = layer, times
        self._names = f"weight{names}", f"bias{names}"
        self._inputs: list[Tensor] = []
        self._node: Tensor | None = None

    def __call__(self, given: Tensor) -> Tensor:
        """Return W x + b; the input itself where the layer has no such weight."""
        weight, bias = (getattr(self._layer, name, None) for name in self._names)
        if weight is None:
            return given
        output = F.linear(given, weight, bias)
        if self._node is None:
            self._node = output.new_zeros(self._times, *output.shape).requires_grad_()
        output = output + self._node[len(self._inputs)]
        self._inputs.append(given.detach())
        return output

    @property
    def uses(self) -> list[ParameterUse]:
        """What was used, all positions of a sample together."""
        if self._node is None:
            return []
        return [ParameterUse(trained(self._layer, *self._names), _laid(torch.stack(self._inputs)), self._node, _laid)]


def _laid(steps: Tensor) -> Tensor:
    """Return `(..., n, d)` as `(n, 1, t, d)`."""
    return at_least_float32(steps.flatten(0, -3).transpose(0, 1)[:, None])


def _step_of(layer: nn.Module) -> Callable[[Tensor, State, Map, Map], State]:
    if isinstance(layer, (nn.LSTM, nn.LSTMCell)):
        return _lstm
    if isinstance(layer, (nn.GRU, nn.GRUCell)):
        return _gru
    activation = torch.relu if layer.nonlinearity == "relu" else torch.tanh
    return lambda given, state, across, _: (activation(given + across(state[0])),)


def _lstm(given: Tensor, state: State, across: Map, down: Map) -> State:
    into, keep, new, out = (given + across(state[0])).chunk(4, dim=-1)
    held = keep.sigmoid() * state[1] + into.sigmoid() * new.tanh()
    return down(out.sigmoid() * held.tanh()), held


def _gru(given: Tensor, state: State, across: Map, _: Map) -> State:
    (reset, keep, new), (reset_h, keep_h, new_h) = given.chunk(3, dim=-1), across(state[0]).chunk(3, dim=-1)
    kept = (keep + keep_h).sigmoid()
    fresh = (new + (reset + reset_h).sigmoid() * new_h).tanh()
    return ((1 - kept) * fresh + kept * state[0],)


def _states(start: Any) -> State:
    return start if isinstance(start, tuple) else (start,)


def _unpacked(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """Return the padded steps `(t, n, i)` in the samples' own order, and which of them are real, `(t, n, 1)`."""
    real = _real(packed)[..., None]
    steps = packed.data.new_zeros(*real.shape[:2], packed.data.shape[-1]).masked_scatter(real, packed.data)
    return steps[:, packed.unsorted_indices], real[:, packed.unsorted_indices]


def _packed(steps: Tensor, like: PackedSequence) -> PackedSequence:
    data = steps[:, like.sorted_indices][_real(like)]
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)


def _real(packed: PackedSequence) -> Tensor:
    sizes = packed.batch_sizes.to(packed.data.device)
    return torch.arange(int(packed.batch_sizes[0]), device=sizes.device)[None] < sizes[:, None]
