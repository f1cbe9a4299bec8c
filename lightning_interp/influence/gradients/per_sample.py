"""One forward of a batch, from which the per-sample gradients of every covered parameter are taken."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_interp.data.batch import count_samples
from lightning_interp.data.task import Task
from lightning_interp.influence.gradients.blocks import ParameterBlock
from lightning_interp.influence.gradients.factored import (
    FactoredGradients,
    Lookup,
    concatenate_positions,
    merge_repeated_rows,
)
from lightning_interp.influence.gradients.fallback import FallbackGradients
from lightning_interp.influence.gradients.rules import LayerCall, ParameterUse, Rule


class WatchedLayer(NamedTuple):
    """A layer whose calls are recorded.

    Args:
        name: of the layer in its model.
        rule: how its calls yield factors.
        axis: the dimension of its inputs along which samples lie.
    """

    name: str
    rule: Rule
    axis: int


@dataclass(frozen=True, eq=False)
class WatchedModel:
    """Which layers of a model are recorded, and which blocks their gradients fill.

    Args:
        model: in eval mode (see `lightning_interp.network.undisturbed.differentiable`).
        task: how to call it and its loss.
        layers: those whose calls are recorded.
        parameter_names: parameter (by identity) → its name.
        blocks: parameter name → the block that it lies in.
        fallback: differentiates the parameters that no rule covers.
    """

    model: nn.Module
    task: Task
    layers: Sequence[WatchedLayer]
    parameter_names: Mapping[int, str]
    blocks: Mapping[str, ParameterBlock]
    fallback: FallbackGradients | None = None

    def blocks_of(self, layer: str, paths: tuple[str, ...]) -> list[tuple[ParameterBlock, list[str]]]:
        """Return the blocks that a layer's parameters lie in, each with the names of those that lie in it."""
        if (layer, paths) not in self._blocks_of:
            module = self.model.get_submodule(layer)
            parameters = map(module.get_parameter, paths)
            names = [self.parameter_names[id(p)] for p in parameters if id(p) in self.parameter_names]
            blocks = {block.name: block for name in names if (block := self.blocks.get(name)) is not None}
            self._blocks_of[layer, paths] = [
                (block, [name for name in names if name in block.parameters]) for block in blocks.values()
            ]
        return self._blocks_of[layer, paths]

    @cached_property
    def _blocks_of(self) -> dict[tuple[str, tuple[str, ...]], list[tuple[ParameterBlock, list[str]]]]:
        return {}


class PerSampleGradients:
    """One forward of a batch; of a task by training steps, one step on it.

    A step gives no outputs and no losses per sample: they take further forwards, which are made on first use.

    Attributes:
        batch: what went in.
        uses: layer and use of each place where its parameters entered.
    """

    def __init__(self, watched_model: WatchedModel, batch: Any) -> None:
        self._watched_model, self.batch, self._n = watched_model, batch, count_samples(batch)
        self.uses: list[tuple[str, ParameterUse]] = []
        self._outputs_targets_losses: tuple[Tensor, Tensor, Tensor] | None = None
        with _record_calls(watched_model, self._record):
            if watched_model.task.step is None:
                self._outputs_targets_losses = watched_model.task.losses(watched_model.model, batch)
                self._total_loss = self._outputs_targets_losses[2].sum()
            else:
                self._total_loss = watched_model.task.total(watched_model.model, batch)

    def __len__(self) -> int:
        return self._n

    @property
    def outputs(self) -> Tensor:
        """The model's outputs."""
        values = self._outputs_targets_losses
        return values[0] if values is not None else self._without_step.outputs

    @property
    def targets(self) -> Tensor:
        """The batch's targets."""
        values = self._outputs_targets_losses
        return values[1] if values is not None else self._watched_model.task.targets(self.batch)

    @cached_property
    def losses(self) -> Tensor:
        """Loss per sample, `(n,)`; of a task by training steps, that of each sample alone."""
        if self._outputs_targets_losses is not None:
            return self._outputs_targets_losses[2]
        return self._watched_model.task.one_by_one(self._watched_model.model, self.batch)

    @cached_property
    def _without_step(self) -> PerSampleGradients:
        """The same batch, by outputs and `Task.loss`."""
        task = dataclasses.replace(self._watched_model.task, step=None)
        return PerSampleGradients(dataclasses.replace(self._watched_model, task=task), self.batch)

    def _record(self, layer: WatchedLayer, call: LayerCall) -> Any:
        # The samples do not lie along that axis in this call, so that no sample has factors of its own.
        if call.samples != self._n:
            return call.output
        output, uses = layer.rule(call)
        self.uses += [(layer.name, use) for use in uses if use.parameters]
        return output

    def assign_blocks(self, blocks: Mapping[str, ParameterBlock]) -> PerSampleGradients:
        """Let the gradients fill these blocks, parameter name → block, from now on."""
        self._watched_model = dataclasses.replace(self._watched_model, blocks=blocks)
        return self

    def loss_gradients(self, keep_graph: bool = False) -> dict[str, FactoredGradients]:
        """Return each block's gradients of the samples' losses.

        Args:
            keep_graph: leave the autograd graph in place for further calls.
        """
        gradients = self._differentiate(self._total_loss, torch.ones_like(self._total_loss), keep_graph)
        if self._watched_model.fallback is not None:
            gradients |= self._watched_model.fallback.of_losses(self.batch)
        return gradients

    def output_gradients(self, weights: Tensor, keep_graph: bool = False) -> dict[str, FactoredGradients]:
        """Return each block's gradients of Σ outputs ⊙ weights, sample by sample.

        Args:
            weights: in the outputs' shape.
            keep_graph: leave the autograd graph in place for further calls.
        """
        if self._outputs_targets_losses is None:
            return self._without_step.output_gradients(weights, keep_graph)
        gradients = self._differentiate(self.outputs, weights.to(self.outputs), keep_graph)
        if self._watched_model.fallback is not None:
            gradients |= self._watched_model.fallback.of_outputs(self.batch, weights)
        return gradients

    def _differentiate(self, values: Tensor, weights: Tensor, keep_graph: bool) -> dict[str, FactoredGradients]:
        """Return the gradients of Σ values ⊙ weights by one backward, the uses of a block joined."""
        if not self.uses:
            return {}
        nodes = [use.node for _, use in self.uses]
        # A layer that was called without an effect on the values has no gradient: zeros then.
        node_gradients = torch.autograd.grad(values, nodes, weights, retain_graph=keep_graph, allow_unused=True)
        by_block: dict[str, list[FactoredGradients]] = {}
        for (layer, use), gradient in zip(self.uses, node_gradients, strict=True):
            outputs = use.arrange(torch.zeros_like(use.node) if gradient is None else gradient)
            for block, names in self._watched_model.blocks_of(layer, use.parameters):
                by_block.setdefault(block.name, []).append(_lay_out(block, names, use, outputs))
        return {block: concatenate_positions(gradients) for block, gradients in by_block.items()}


def _lay_out(block: ParameterBlock, names: Sequence[str], use: ParameterUse, outputs: Tensor) -> FactoredGradients:
    """Return the factors of one use, `outputs` its node's gradient, in the layout of the block that it fills."""
    if block.layout == "vector":
        values = outputs.sum(2) if outputs.shape[2] > 1 else outputs[:, :, 0]
        return FactoredGradients(outputs.new_ones(len(outputs), 1, 1, 1), values.reshape(len(outputs), 1, 1, -1))
    if isinstance(use.inputs, Lookup):
        if block.layout == "table":
            return merge_repeated_rows(use.inputs.index, outputs[:, 0], use.inputs.count)
        # A table tied to a linear layer's weight: its rows are that matrix's outputs, so the two factors change places.
        return FactoredGradients(outputs, use.inputs.dense().to(outputs))
    if len(names) == 1:
        return FactoredGradients(use.inputs.to(outputs), outputs)
    # A bias is the last column of its weight, and the input of that column is one.
    return FactoredGradients(F.pad(use.inputs.to(outputs), (0, 1), value=1.0), outputs)


@contextlib.contextmanager
def _record_calls(watched_model: WatchedModel, record: Callable[[WatchedLayer, LayerCall], Any]) -> Iterator[None]:
    """Hand each call of a watched layer to `record`; what it returns replaces the layer's output."""
    handles = []
    try:
        for layer in watched_model.layers:
            module = watched_model.model.get_submodule(layer.name)
            handles.append(module.register_forward_hook(_recording_hook(layer, record), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recording_hook(layer: WatchedLayer, record: Callable[[WatchedLayer, LayerCall], Any]) -> Callable[..., Any]:
    return lambda module, args, kwargs, output: record(layer, LayerCall(module, args, kwargs, output, layer.axis))
