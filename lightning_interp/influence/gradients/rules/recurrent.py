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
    inputs = call.argument(0, "input")
    if isinstance(inputs, PackedSequence):
        if inputs.sorted_indices is None:
            return call.output, []
        steps, is_step = _unpack(inputs)
        outputs, state, uses = _run_layers(call, steps, is_step)
        return (_pack(outputs, inputs), state), uses
    sample_axis = 0 if call.layer.batch_first else 1
    if inputs.ndim != 3 or call.axis != sample_axis:
        return call.output, []
    outputs, state, uses = _run_layers(call, inputs.transpose(0, 1 - sample_axis), None)
    return (outputs.transpose(0, 1 - sample_axis), state), uses


def cell(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
    """Return the factors of an `nn.RNNCell`, `nn.LSTMCell` or `nn.GRUCell`: one step."""
    inputs = call.argument(0, "input")
    if inputs.ndim != 2 or call.axis != 0:
        return call.output, []
    start = call.argument(1, "hx")
    scan = _Scan(call.layer, "")
    state = _as_state(start) if start is not None else scan.zero_state(inputs)
    _, state = scan(inputs[None], state, None)
    return state if isinstance(call.output, tuple) else state[0], scan.uses


def _run_layers(call: LayerCall, steps: Tensor, is_step: Tensor | None) -> tuple[Tensor, Any, list[ParameterUse]]:
    """Run every layer on `(t, n, i)`; `is_step` marks the positions that are no padding, `(t, n, 1)`."""
    layer, start = call.layer, call.argument(1, "hx")
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    last_states: list[State] = []
    uses: list[ParameterUse] = []
    for depth in range(layer.num_layers):
        outputs = []
        for direction in directions:
            scan = _Scan(layer, f"_l{depth}{direction}")
            if start is None:
                state = scan.zero_state(steps[0])
            else:  # torch stacks the states of all layers and directions in the order of these loops
                state = tuple(values[len(last_states)] for values in _as_state(start))
            direction_outputs, state = scan(steps, state, is_step, backwards=bool(direction))
            outputs.append(direction_outputs)
            last_states.append(state)
            uses += scan.uses
        steps = torch.cat(outputs, dim=-1)
    last_state = tuple(map(torch.stack, zip(*last_states, strict=True)))
    return steps, last_state if isinstance(layer, nn.LSTM) else last_state[0], uses


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
        self, steps: Tensor, state: State, is_step: Tensor | None, backwards: bool = False
    ) -> tuple[Tensor, State]:
        """Return the outputs `(t, n, o)` and the last state; at padding the state does not change."""
        input_map = _RepeatedMap(self._layer, f"_ih{self._suffix}", 1)
        state_map = _RepeatedMap(self._layer, f"_hh{self._suffix}", len(steps))
        projection = _RepeatedMap(self._layer, f"_hr{self._suffix}", len(steps))
        # The map of the inputs does not depend on the state, so that all steps go through it at once.
        mapped_inputs, outputs = input_map(steps).unbind(), []
        order = range(len(steps))[:: -1 if backwards else 1]
        for t in order:
            new_state = self._step(mapped_inputs[t], state, state_map, projection)
            if is_step is not None:
                pairs = zip(new_state, state, strict=True)
                new_state = tuple(torch.where(is_step[t], new, old) for new, old in pairs)
            state = new_state
            outputs.append(state[0])
        self.uses += [use for linear_map in (input_map, state_map, projection) for use in linear_map.uses]
        return torch.stack([outputs[t] for t in order]), state

    def zero_state(self, inputs: Tensor) -> State:
        """Return the state a layer starts from by default; its input is `(n, i)`."""
        hidden = self._layer.hidden_size
        widths = (getattr(self._layer, "proj_size", 0) or hidden, hidden)
        count = 2 if isinstance(self._layer, (nn.LSTM, nn.LSTMCell)) else 1
        return tuple(inputs.new_zeros(len(inputs), width) for width in widths[:count])


class _RepeatedMap:
    """A linear map applied many times: zeros added to what comes out are the node whose gradient is taken.

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

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return W x + b; the input itself where the layer has no such weight."""
        weight, bias = (getattr(self._layer, name, None) for name in self._names)
        if weight is None:
            return inputs
        output = F.linear(inputs, weight, bias)
        if self._node is None:  # one node for all steps, so that a single gradient covers them
            self._node = output.new_zeros(self._times, *output.shape).requires_grad_()
        output = output + self._node[len(self._inputs)]
        self._inputs.append(inputs.detach())
        return output

    @property
    def uses(self) -> list[ParameterUse]:
        """The use of its parameters, all positions of a sample together."""
        if self._node is None:
            return []
        inputs = _samples_before_steps(torch.stack(self._inputs))
        return [ParameterUse(trained(self._layer, *self._names), inputs, self._node, _samples_before_steps)]


def _samples_before_steps(steps: Tensor) -> Tensor:
    """Return `(..., n, d)` as `(n, 1, t, d)`."""
    return at_least_float32(steps.flatten(0, -3).transpose(0, 1)[:, None])


def _step_of(layer: nn.Module) -> Callable[[Tensor, State, Map, Map], State]:
    """Return the layer's recurrence: mapped input, state, the state's map, the output's projection → next state."""
    if isinstance(layer, (nn.LSTM, nn.LSTMCell)):
        return _lstm
    if isinstance(layer, (nn.GRU, nn.GRUCell)):
        return _gru
    activation = torch.relu if layer.nonlinearity == "relu" else torch.tanh
    return lambda mapped_input, state, state_map, _: (activation(mapped_input + state_map(state[0])),)


def _lstm(mapped_input: Tensor, state: State, state_map: Map, projection: Map) -> State:
    input_gate, forget_gate, candidate, output_gate = (mapped_input + state_map(state[0])).chunk(4, dim=-1)
    cell_state = forget_gate.sigmoid() * state[1] + input_gate.sigmoid() * candidate.tanh()
    return projection(output_gate.sigmoid() * cell_state.tanh()), cell_state


def _gru(mapped_input: Tensor, state: State, state_map: Map, _: Map) -> State:
    reset, update, candidate = mapped_input.chunk(3, dim=-1)
    reset_h, update_h, candidate_h = state_map(state[0]).chunk(3, dim=-1)
    update_gate = (update + update_h).sigmoid()
    new_state = (candidate + (reset + reset_h).sigmoid() * candidate_h).tanh()
    return ((1 - update_gate) * new_state + update_gate * state[0],)


def _as_state(start: Any) -> State:
    return start if isinstance(start, tuple) else (start,)


def _unpack(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """Return the padded steps `(t, n, i)` in the samples' own order, and which are no padding, `(t, n, 1)`."""
    is_step = _is_step(packed)[..., None]
    steps = packed.data.new_zeros(*is_step.shape[:2], packed.data.shape[-1]).masked_scatter(is_step, packed.data)
    return steps[:, packed.unsorted_indices], is_step[:, packed.unsorted_indices]


def _pack(steps: Tensor, like: PackedSequence) -> PackedSequence:
    data = steps[:, like.sorted_indices][_is_step(like)]
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)


def _is_step(packed: PackedSequence) -> Tensor:
    sizes = packed.batch_sizes.to(packed.data.device)
    return torch.arange(int(packed.batch_sizes[0]), device=sizes.device)[None] < sizes[:, None]
