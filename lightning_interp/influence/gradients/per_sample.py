"""One forward of a batch, from which per-sample gradients of every covered parameter can be asked."""

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

from lightning_interp.data.batch import size
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
    """A layer that is watched.

    Args:
        layer: its name.
        rule: how its calls yield factors.
        axis: the dimension of its inputs along which samples lie.
    """

    layer: str
    rule: Rule
    axis: int


@dataclass(frozen=True, eq=False)
class WatchedModel:
    """What is watched of a model, and where its gradients go.

    Args:
        model: in eval mode (see `lightning_interp.network.undisturbed.differentiable`).
        task: how to call it and its loss.
        sites: the layers.
        names: parameter (by identity) → its name.
        blocks: parameter name → the block that it lies in.
        fallback: parameters that no rule covers.
    """

    model: nn.Module
    task: Task
    sites: Sequence[WatchedLayer]
    names: Mapping[int, str]
    blocks: Mapping[str, ParameterBlock]
    fallback: FallbackGradients | None = None

    def fed(self, layer: str, paths: tuple[str, ...]) -> list[tuple[ParameterBlock, list[str]]]:
        """Return the blocks that a layer's parameters lie in, each with their names."""
        known = self._fed.get((layer, paths))
        if known is None:
            part = self.model.get_submodule(layer)
            names = [self.names[id(p)] for p in map(part.get_parameter, paths) if id(p) in self.names]
            blocks = {block.name: block for name in names if (block := self.blocks.get(name)) is not None}
            known = [(block, [name for name in names if name in block.parameters]) for block in blocks.values()]
            self._fed[layer, paths] = known
        return known

    @cached_property
    def _fed(self) -> dict[tuple[str, tuple[str, ...]], list[tuple[ParameterBlock, list[str]]]]:
        return {}


class PerSampleGradients:
    """One forward of a batch; of a task by training steps, one step on it.

    A step gives no outputs and no losses per sample: they take further forwards, made when they are asked for.

    Attributes:
        batch: what went in.
        uses: layer and use of each place where its parameters entered.
    """

    def __init__(self, watch: WatchedModel, batch: Any) -> None:
        self._watch, self.batch, self._n = watch, batch, size(batch)
        self.uses: list[tuple[str, ParameterUse]] = []
        self._plain: tuple[Tensor, Tensor, Tensor] | None = None
        with _hooked(watch, self._note):
            if watch.task.step is None:
                self._plain = watch.task.losses(watch.model, batch)
                self._total = self._plain[2].sum()
            else:
                self._total = watch.task.total(watch.model, batch)

    def __len__(self) -> int:
        return self._n

    @property
    def outputs(self) -> Tensor:
        """The model's outputs."""
        return self._plain[0] if self._plain is not None else self._unstepped.outputs

    @property
    def targets(self) -> Tensor:
        """The batch's targets."""
        return self._plain[1] if self._plain is not None else self._watch.task.targets(self.batch)

    @cached_property
    def losses(self) -> Tensor:
        """Loss per sample, `(n,)`; of a task by training steps, that of each sample alone."""
        if self._plain is not None:
            return self._plain[2]
        return self._watch.task.one_by_one(self._watch.model, self.batch)

    @cached_property
    def _unstepped(self) -> PerSampleGradients:
        """The same batch, by outputs and `Task.loss`."""
        task = dataclasses.replace(self._watch.task, step=None)
        return PerSampleGradients(dataclasses.replace(self._watch, task=task), self.batch)

    def _note(self, site: WatchedLayer, call: LayerCall) -> Any:
        if call.samples != self._n:
            return call.output
        output, uses = site.rule(call)
        self.uses += [(site.layer, use) for use in uses if use.parameters]
        return output

    def fill(self, blocks: Mapping[str, ParameterBlock]) -> PerSampleGradients:
        """Let its gradients go into these blocks from now on."""
        self._watch = dataclasses.replace(self._watch, blocks=blocks)
        return self

    def loss_gradients(self, keep_graph: bool = False) -> dict[str, FactoredGradients]:
        """Return each block's rows for the gradients of the samples' losses; `keep_graph` the graph to ask again."""
        found = self._rows(self._total, torch.ones_like(self._total), keep_graph)
        if self._watch.fallback is not None:
            found |= self._watch.fallback.of_losses(self.batch)
        return found

    def output_gradients(self, weights: Tensor, keep_graph: bool = False) -> dict[str, FactoredGradients]:
        """Return each block's rows for the gradients of Σ outputs ⊙ weights, sample by sample.

        Args:
            weights: in the outputs' shape.
            keep_graph: the graph, to ask again.
        """
        if self._plain is None:
            return self._unstepped.output_gradients(weights, keep_graph)
        found = self._rows(self.outputs, weights.to(self.outputs), keep_graph)
        if self._watch.fallback is not None:
            found |= self._watch.fallback.of_outputs(self.batch, weights)
        return found

    def _rows(self, of: Tensor, weights: Tensor, keep_graph: bool) -> dict[str, FactoredGradients]:
        if not self.uses:
            return {}
        nodes = [use.node for _, use in self.uses]
        found = torch.autograd.grad(of, nodes, weights, retain_graph=keep_graph, allow_unused=True)
        parts: dict[str, list[FactoredGradients]] = {}
        for (layer, use), grad in zip(self.uses, found, strict=True):
            outputs = use.arrange(torch.zeros_like(use.node) if grad is None else grad)
            for block, rows in self._laid_out(layer, use, outputs):
                parts.setdefault(block, []).append(rows)
        return {block: concatenate_positions(held) for block, held in parts.items()}

    def _laid_out(self, layer: str, use: ParameterUse, outputs: Tensor) -> Iterator[tuple[str, FactoredGradients]]:
        """Yield the rows of each block that a use feeds."""
        for block, names in self._watch.fed(layer, use.parameters):
            yield block.name, _in_block(block, names, use, outputs)


def _in_block(block: ParameterBlock, names: Sequence[str], use: ParameterUse, outputs: Tensor) -> FactoredGradients:
    if block.layout == "vector":
        whole = outputs.sum(2) if outputs.shape[2] > 1 else outputs[:, :, 0]
        return FactoredGradients(outputs.new_ones(len(outputs), 1, 1, 1), whole.reshape(len(outputs), 1, 1, -1))
    if isinstance(use.inputs, Lookup):
        if block.layout == "table":
            return merge_repeated_rows(use.inputs.index, outputs[:, 0], use.inputs.count)
        return FactoredGradients(outputs, use.inputs.dense().to(outputs))
    if len(names) == 1:
        return FactoredGradients(use.inputs.to(outputs), outputs)
    return FactoredGradients(F.pad(use.inputs.to(outputs), (0, 1), value=1.0), outputs)


@contextlib.contextmanager
def _hooked(watch: WatchedModel, note: Callable[[WatchedLayer, LayerCall], Any]) -> Iterator[None]:
    handles = []
    try:
        for site in watch.sites:
            part = watch.model.get_submodule(site.layer)
            handles.append(part.register_forward_hook(_hook(site, note), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(site: WatchedLayer, note: Callable[[WatchedLayer, LayerCall], Any]) -> Callable[..., Any]:
    return lambda part, args, kwargs, output: note(site, LayerCall(part, args, kwargs, output, site.axis))
