"""Which parameters' per-sample gradients are right: by a rule, by `torch.func`, one by one, or left out by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp.data.batch import count_samples, slice_samples, tensors
from lightning_interp.data.task import Task
from lightning_interp.influence.gradients.blocks import ParameterBlock
from lightning_interp.influence.gradients.factored import FactoredGradients, Lookup
from lightning_interp.influence.gradients.fallback import FallbackGradients, vector_blocks
from lightning_interp.influence.gradients.per_sample import PerSampleGradients, WatchedLayer, WatchedModel
from lightning_interp.influence.gradients.rules import RULES, LayerCall, ParameterUse, Rule
from lightning_interp.network.undisturbed import capture

# Of the largest entry. Half precision inside a network rounds each number by up to 2⁻⁸ = 0.4%, several times in a row.
GRADIENT_TOLERANCE = 2e-2
COMPARED_SAMPLES = 2  # a layer that mixes samples can be right for one of them by chance
SEARCH_SAMPLES = 3  # one more, so that a dimension of 2, such as directions or channels, is not taken for the samples


class MemoryPerSample(NamedTuple):
    """Number of elements that one sample keeps in memory.

    Args:
        factors: block → elements of its gradient's factors.
        activations: of the sample itself and of all submodules' outputs.
    """

    factors: Mapping[str, int]
    activations: int


@dataclass(frozen=True, eq=False)
class Coverage:
    """The parameters of a model whose per-sample gradients were checked against autograd on a few samples.

    It stays valid while other weights are loaded into the same model, and can be handed to any number of fits.

    Args:
        watched_model: the model, the task, the layers that are watched and the blocks they fill.
        blocks: name → block, in the order of the forward.
        left_out: trained parameters without per-sample gradients → their number of elements.
        batch: the samples that it was checked on, at most three, on the model's device.
        memory: what one sample takes.
    """

    watched_model: WatchedModel
    blocks: Mapping[str, ParameterBlock]
    left_out: Mapping[str, int]
    batch: Any
    memory: MemoryPerSample

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
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].numel() for block in self.blocks.values() for name in block.parameters}

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

    It takes a forward and a backward of each of two samples and one of three together; once more of three where a
    layer's samples do not lie along its first dimension, and for each attempt at what no rule covers.

    Args:
        model: in eval mode.
        task: how to call it and its loss.
        batch: two samples or more, on its device.
        layers: names of the layers whose parameters enter; all when None.

    Raises:
        FloatingPointError: the first samples' losses are not finite.
    """
    batch = slice_samples(batch, 0, min(SEARCH_SAMPLES, count_samples(batch)))
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad and _in_layers(name, layers)}
    search = _Search(model, task, batch, names, _gradients_by_autograd(model, task, batch, names))
    candidates = list(search.candidates())
    verified = search.verify(candidates)
    # Layers of sequences may have their samples along the second dimension: tried where the first fails.
    turned = [layer._replace(axis=1) if search.misses(layer, verified) else layer for layer in candidates]
    if turned != candidates:
        verified = search.verify(turned)
    return search.coverage(verified)


class _Verified(NamedTuple):
    """What one pass of the search found right: the layers and blocks, and what a sample's factors take."""

    watched_model: WatchedModel
    memory: MemoryPerSample


@dataclass(frozen=True, eq=False)
class _Search:
    """What coverage is searched with: a few samples, and autograd's own gradients of the first of them."""

    model: nn.Module
    task: Task
    batch: Any
    parameter_names: Mapping[int, str]
    expected_gradients: Sequence[Mapping[str, Tensor]]

    def candidates(self) -> Iterator[WatchedLayer]:
        """Yield the layers that have a rule and parameters to cover."""
        for name, module in self.model.named_modules():
            rule = _rule_of(module)
            if rule is not None and self.names_of(name):
                yield WatchedLayer(name, rule, axis=0)

    def verify(self, layers: Sequence[WatchedLayer]) -> _Verified:
        """Return those of these layers and of their parameters whose gradients are right."""
        # While a rule is being verified, an error in it means only that it does not cover the layer.
        cautious = [layer._replace(rule=_cautious(layer.rule)) for layer in layers]
        watched_model = WatchedModel(self.model, self.task, cautious, self.parameter_names, {})
        modules = [name for name, _ in self.model.named_modules()]
        with capture(self.model, modules, lambda _, __, output: output.numel()) as output_sizes:
            forward = PerSampleGradients(watched_model, self.batch)
        blocks = list(self._blocks(forward.uses))
        gradients = forward.assign_blocks(_by_parameter(blocks)).loss_gradients()
        correct = [block for block in blocks if self.agrees(block, gradients[block.name])]
        covered = _by_parameter(correct)
        kept_layers = [layer for layer in layers if not self.names_of(layer.name).isdisjoint(covered)]
        activations = sum(map(sum, output_sizes.values())) + sum(tensor.numel() for tensor in tensors(self.batch))
        return _Verified(
            WatchedModel(self.model, self.task, kept_layers, self.parameter_names, covered),
            MemoryPerSample(self._factor_sizes(correct, gradients), -(-activations // count_samples(self.batch))),
        )

    def names_of(self, layer: str) -> set[str]:
        """Return the names of a layer's parameters that are to be covered."""
        parameters = self.model.get_submodule(layer).parameters()
        return {self.parameter_names[id(p)] for p in parameters if id(p) in self.parameter_names}

    def misses(self, layer: WatchedLayer, verified: _Verified) -> bool:
        """Say whether a layer's parameters reach the loss, and none of them is covered."""
        reached = self.names_of(layer.name) & self.expected_gradients[0].keys()
        return bool(reached) and reached.isdisjoint(verified.watched_model.blocks)

    def agrees(self, block: ParameterBlock, gradients: FactoredGradients) -> bool:
        """Say whether a block's per-sample gradients are those of autograd."""
        if len(gradients) != count_samples(self.batch):
            return False
        compared = gradients.at(slice(len(self.expected_gradients)))
        values = block.unpack(compared.gradients())
        return all(
            name in expected and _gradients_agree(values[name][sample], expected[name])
            for sample, expected in enumerate(self.expected_gradients)
            for name in block.parameters
        )

    def coverage(self, verified: _Verified) -> Coverage:
        """Add what `torch.func` can do, or a backward for each sample, and name the rest."""
        watched_model, memory = verified
        missing = [name for name in self.expected_gradients[0] if name not in watched_model.blocks]
        blocks = {block.name: block for block in watched_model.blocks.values()}
        fallback, factor_sizes = self._find_fallback(missing)
        if fallback is not None:
            watched_model = dataclasses.replace(watched_model, fallback=fallback)
            blocks |= {block.name: block for block in fallback.blocks}
            # The fallback has a forward of its own, which makes every output a second time.
            memory = MemoryPerSample({**memory.factors, **factor_sizes}, 2 * memory.activations)
        covered = {name for block in blocks.values() for name in block.parameters}
        left_out = {n: p.numel() for n, p in self.model.named_parameters() if p.requires_grad and n not in covered}
        return Coverage(watched_model, blocks, left_out, self.batch, memory)

    def _find_fallback(self, names: Sequence[str]) -> tuple[FallbackGradients | None, dict[str, int]]:
        """Return the faster of two ways that gets any of these parameters right, and what their factors take."""
        blocks = list(vector_blocks(self.model, names))
        for vectorised in (True, False) if blocks else ():
            attempt = FallbackGradients(self.model, self.task, blocks, vectorised)
            try:
                gradients = attempt.of_losses(self.batch)
            except Exception:
                continue  # torch.func refuses what it cannot follow by errors of many kinds
            correct = [block for block in blocks if self.agrees(block, gradients[block.name])]
            if correct:
                fallback = FallbackGradients(self.model, self.task, correct, vectorised)
                return fallback, self._factor_sizes(correct, gradients)
        return None, {}

    def _factor_sizes(
        self, blocks: Sequence[ParameterBlock], gradients: Mapping[str, FactoredGradients]
    ) -> dict[str, int]:
        """Return the number of elements that one sample's factors take, per block."""
        return {block.name: gradients[block.name].stored_elements // count_samples(self.batch) for block in blocks}

    def _blocks(self, uses: Sequence[tuple[str, ParameterUse]]) -> Iterator[ParameterBlock]:
        """Yield the blocks that these uses fill: a weight with its bias, unless either is shared."""
        users: dict[str, set[str]] = {}
        named_uses = [(self._parameters_of(layer, use), layer, use) for layer, use in uses]
        for names, layer, _ in named_uses:
            for name in names:
                users.setdefault(name, set()).add(layer)
        assigned: set[str] = set()
        for names, _, use in named_uses:
            # The layers that share a weight have biases of their own, so that weight and bias are separate blocks.
            shared = any(len(users[name]) > 1 for name in names)
            for group in [(name,) for name in names] if shared else [names]:
                if group and not assigned & set(group):
                    assigned.update(group)
                    yield self._block(group, use, shared)

    def _parameters_of(self, layer: str, use: ParameterUse) -> tuple[str, ...]:
        module = self.model.get_submodule(layer)
        parameters = [module.get_parameter(path) for path in use.parameters]
        return tuple(self.parameter_names[id(p)] for p in parameters if id(p) in self.parameter_names)

    def _block(self, names: tuple[str, ...], use: ParameterUse, shared: bool) -> ParameterBlock:
        shapes = tuple(self.model.get_parameter(name).shape for name in names)
        if isinstance(use.inputs, Lookup):
            return ParameterBlock(names[0], names, shapes, "matrix" if shared else "table")
        # A normalisation comes with ones as inputs, even where its parameters have several dimensions.
        if len(shapes[0]) < 2 or (use.inputs.shape[3] == 1 and shapes[0][1:].numel() != 1):
            return ParameterBlock(names[0], names, shapes, "vector")
        return ParameterBlock(names[0], names, shapes, "matrix", use.inputs.shape[1])


def _in_layers(name: str, layers: Sequence[str] | None) -> bool:
    return layers is None or any(name.startswith(f"{layer}." if layer else "") for layer in layers)


def _by_parameter(blocks: Sequence[ParameterBlock]) -> dict[str, ParameterBlock]:
    return {name: block for block in blocks for name in block.parameters}


def _rule_of(module: nn.Module) -> Rule | None:
    """Return the rule of a module's kind, unless a subclass has a forward of its own."""
    rules = (rule for kind, rule in RULES.items() if isinstance(module, kind) and type(module).forward is kind.forward)
    return next(rules, None)


def _cautious(rule: Rule) -> Rule:
    """Return a rule that yields nothing where it cannot read a call."""

    def attempt(call: LayerCall) -> tuple[Any, list[ParameterUse]]:
        try:
            return rule(call)
        except Exception:
            return call.output, []

    return attempt


def _gradients_by_autograd(
    model: nn.Module, task: Task, batch: Any, parameter_names: Mapping[int, str]
) -> list[dict[str, Tensor]]:
    """Return the gradients of the first samples' losses, one sample at a time, of parameters that reach them."""
    parameters = [p for p in model.parameters() if id(p) in parameter_names]
    gradients = []
    for sample in range(min(COMPARED_SAMPLES, count_samples(batch))):
        loss = task.total(model, slice_samples(batch, sample, sample + 1))
        if not bool(loss.isfinite()):
            raise FloatingPointError("influence: losses of the first training samples hold NaN or infinity")
        # A loss that no trained parameter reaches has no graph to differentiate.
        values = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else []
        pairs = zip(parameters, values, strict=bool(values))
        gradients.append({parameter_names[id(p)]: value for p, value in pairs if value is not None})
    return gradients


def _gradients_agree(ours: Tensor, expected: Tensor) -> bool:
    # Where the expected gradient is zero, only zeros agree.
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return bool((ours - expected).abs().max() <= GRADIENT_TOLERANCE * scale)
