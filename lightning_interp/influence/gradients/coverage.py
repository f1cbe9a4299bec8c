"""Which parameters' per-sample gradients are right: by a rule, by `torch.func`, one by one, or left out by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.data.batch import size, take
from lightning_interp.data.task import Task
from lightning_interp.influence.gradients.blocks import ParameterBlock
from lightning_interp.influence.gradients.factored import FactoredGradients, Lookup
from lightning_interp.influence.gradients.fallback import FallbackGradients, fallback_works, vector_blocks
from lightning_interp.influence.gradients.per_sample import PerSampleGradients, WatchedLayer, WatchedModel
from lightning_interp.influence.gradients.rules import RULES, LayerCall, ParameterUse, Rule

TOLERANCE = 2e-2
CHECKED = 2


@dataclass(frozen=True, eq=False)
class Coverage:
    """What of a model is watched, checked against autograd on a few samples.

    Args:
        watched_model: the model, the task, the layers that are watched and the blocks they fill.
        blocks: name → block, in the order of the forward.
        left_out: trained parameters without per-sample gradients → their number of elements.
    """

    watched_model: WatchedModel
    blocks: Mapping[str, ParameterBlock]
    left_out: Mapping[str, int]

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.watched_model.model

    @property
    def task(self) -> Task:
        """How to call the network, and its loss."""
        return self.watched_model.task

    @property
    def fallback(self) -> FallbackGradients | None:
        """What differentiates the parameters that no rule covers; None where there are none."""
        return self.watched_model.fallback

    @property
    def parameter_sizes(self) -> dict[str, int]:
        """Covered parameters → their number of elements."""
        held = dict(self.model.named_parameters())
        return {name: held[name].numel() for block in self.blocks.values() for name in block.parameters}

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Block → shape of one gradient."""
        return {name: block.shape for name, block in self.blocks.items()}

    @property
    def size(self) -> int:
        """Number of covered elements."""
        return sum(self.parameter_sizes.values())

    def pack(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return values of each parameter, `(*lead, *its shape)`, as blocks `(*lead, groups, o, i)`."""
        return {name: block.pack(values) for name, block in self.blocks.items()}


def find_coverage(model: nn.Module, task: Task, batch: Any, layers: Sequence[str] | None = None) -> Coverage:
    """Find out which trained parameters of a model are covered.

    A layer's rule counts only where its per-sample gradients equal autograd's own for the first two samples: a weight
    that is also used outside its layer, or a layer that mixes samples, fails. What fails, and what has no rule, is
    differentiated by `torch.func`, checked the same way, or where that cannot follow the model, one sample at a time;
    what is not right then either is left out by name.

    Args:
        model: in eval mode.
        task: how to call it and its loss.
        batch: two samples or more, on its device.
        layers: names of the layers whose parameters enter; all when None.

    Raises:
        FloatingPointError: the first samples' losses are not finite.
    """
    few = take(batch, 0, min(3, size(batch)))
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad and _asked(name, layers)}
    few = take(batch, 0, min(3, size(batch)))
    search = _Search(model, task, few, names, _by_autograd(model, task, few, names))
    sites = [
        WatchedLayer(name, rule, 0) for name, part in model.named_modules() if (rule := _rule_of(part)) is not None
    ]
    watch = search.checked(sites)
    turned = [site._replace(axis=1) if search.misses(site, watch) else site for site in sites]
    if turned != sites:
        watch = search.checked(turned)
    return search.coverage(watch)


@dataclass(frozen=True, eq=False)
class _Search:
    """What coverage is searched with: a few samples, and autograd's own gradients for them."""

    model: nn.Module
    task: Task
    few: Any
    names: Mapping[int, str]
    expected: Sequence[Mapping[str, Tensor]]

    def checked(self, sites: Sequence[WatchedLayer]) -> WatchedModel:
        """Return what of these sites is right."""
        careful = [site._replace(rule=_careful(site.rule)) for site in sites]
        watch = WatchedModel(self.model, self.task, careful, self.names, {})
        trace = PerSampleGradients(watch, self.few)
        blocks = {name: block for block in self._blocks(trace.uses) for name in block.parameters}
        rows = trace.fill(blocks).loss_gradients()
        good = {name: block for name, block in blocks.items() if self.right(block, rows[block.name])}
        kept = [site for site in sites if not self.names_of(site).isdisjoint(good)]
        return WatchedModel(self.model, self.task, kept, self.names, good)

    def names_of(self, site: WatchedLayer) -> set[str]:
        """Return the names of a layer's trained parameters."""
        held = self.model.get_submodule(site.layer).parameters()
        return {self.names[id(parameter)] for parameter in held if id(parameter) in self.names}

    def misses(self, site: WatchedLayer, watch: WatchedModel) -> bool:
        """Say whether a layer's parameters reach the loss, and none of them is covered."""
        reached = self.names_of(site) & self.expected[0].keys()
        return bool(reached) and reached.isdisjoint(watch.blocks)

    def right(self, block: ParameterBlock, rows: FactoredGradients) -> bool:
        """Say whether a block's per-sample gradients are those of autograd."""
        if len(rows) != size(self.few):
            return False
        found = block.unpack(rows.gradients()[: len(self.expected)])
        return all(
            name in grads and _close(found[name][sample], grads[name])
            for sample, grads in enumerate(self.expected)
            for name in block.parameters
        )

    def coverage(self, watch: WatchedModel) -> Coverage:
        """Add what `torch.func` can do, or a backward for each sample, and name the rest."""
        missing = [name for name in self.expected[0] if name not in watch.blocks]
        ways = (self._find_fallback(missing, vectorised) for vectorised in (True, False))
        fallback = next((way for way in ways if way is not None), None) if missing else None
        watch = dataclasses.replace(watch, fallback=fallback)
        found = fallback.blocks if fallback is not None else []
        blocks = {block.name: block for block in (*watch.blocks.values(), *found)}
        covered = {name for block in blocks.values() for name in block.parameters}
        left = {n: p.numel() for n, p in self.model.named_parameters() if p.requires_grad and n not in covered}
        return Coverage(watch, blocks, left)

    def _find_fallback(self, names: Sequence[str], vectorised: bool) -> FallbackGradients | None:
        """Return one way to what no rule covers, with those of these parameters that it gets right."""
        way = FallbackGradients(self.model, self.task, list(vector_blocks(self.model, names)), vectorised)
        if not fallback_works(way, self.few):
            return None
        rows = way.of_losses(self.few)
        right = [block for block in way.blocks if self.right(block, rows[block.name])]
        return FallbackGradients(self.model, self.task, right, vectorised) if right else None

    def _blocks(self, uses: Sequence[tuple[str, ParameterUse]]) -> Iterator[ParameterBlock]:
        """Yield the blocks that these uses fill: a weight with its bias, unless either is shared."""
        users: dict[str, set[str]] = {}
        named = [(self._named(layer, use), layer, use) for layer, use in uses]
        for names, layer, _ in named:
            for name in names:
                users.setdefault(name, set()).add(layer)
        seen: set[str] = set()
        for names, _, use in named:
            shared = any(len(users[name]) > 1 for name in names)
            for group in [(name,) for name in names] if shared else [names]:
                if group and not seen & set(group):
                    seen.update(group)
                    yield self._block(group, use, shared)

    def _named(self, layer: str, use: ParameterUse) -> tuple[str, ...]:
        part = self.model.get_submodule(layer)
        held = [part.get_parameter(path) for path in use.parameters]
        return tuple(self.names[id(parameter)] for parameter in held if id(parameter) in self.names)

    def _block(self, names: tuple[str, ...], use: ParameterUse, shared: bool) -> ParameterBlock:
        held = dict(self.model.named_parameters())
        shapes = tuple(held[name].shape for name in names)
        if isinstance(use.inputs, Lookup):
            return ParameterBlock(names[0], names, shapes, "matrix" if shared else "table")
        if len(shapes[0]) < 2 or (use.inputs.shape[3] == 1 and shapes[0][1:].numel() != 1):
            return ParameterBlock(names[0], names, shapes, "vector")
        return ParameterBlock(names[0], names, shapes, "matrix", use.inputs.shape[1])


def _asked(name: str, layers: Sequence[str] | None) -> bool:
    return layers is None or any(name.startswith(f"{layer}." if layer else "") for layer in layers)


def _rule_of(part: nn.Module) -> Rule | None:
    """Return the rule of a module's kind, unless a subclass has a forward of its own."""
    found = (rule for kind, rule in RULES.items() if isinstance(part, kind) and type(part).forward is kind.forward)
    return next(found, None)


def _careful(rule: Rule) -> Rule:
    """Return a rule that yields nothing where it cannot read a call."""

    def attempt(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
        try:
            return rule(call)
        except Exception:
            return call.output, []

    return attempt


def _by_autograd(model: nn.Module, task: Task, few: Any, names: Mapping[int, str]) -> list[dict[str, Tensor]]:
    """Return the gradients of the first samples' losses, one sample at a time, of parameters that reach them."""
    parameters = [p for p in model.parameters() if id(p) in names]
    found = []
    for sample in range(min(CHECKED, size(few))):
        loss = task.total(model, take(few, sample, sample + 1))
        if not bool(loss.isfinite()):
            raise FloatingPointError("influence: losses of the first training samples hold NaN or infinity")
        grads = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else []
        pairs = zip(parameters, grads, strict=bool(grads))
        found.append({names[id(p)]: grad for p, grad in pairs if grad is not None})
    return found


def _close(ours: Tensor, grad: Tensor) -> bool:
    scale = grad.abs().max().clamp(min=torch.finfo(grad.dtype).tiny)
    return bool((ours - grad).abs().max() <= TOLERANCE * scale)
