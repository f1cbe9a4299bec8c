"""One forward and one backward for all methods that can be read from them."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from lightning_interp.attribution.attributor import Attributor
from lightning_interp.attribution.engine.explained_input import ExplainedInput, gradients
from lightning_interp.attribution.engine.last_map import Candidate, LastMapFinder, positions_of
from lightning_interp.attribution.engine.relu_rules import ReluRule, relu_rule
from lightning_interp.attribution.engine.sites import layer_of, watch_sites
from lightning_interp.attribution.engine.target import Score, Target, logit, recorded, select
from lightning_interp.attribution.results import Explanation, Ranking
from lightning_interp.data.batch import at_least_float32
from lightning_interp.data.task import Task
from lightning_interp.network.undisturbed import explaining

INPUT, LAST_MAP = "input", "last map"


class LayerGradients(NamedTuple):
    """A layer's output, channels first, and the goal's gradient with respect to it; `(n, c, *positions)` each."""

    activations: Tensor
    gradients: Tensor


@dataclass(frozen=True, eq=False)
class Pass:
    """What one forward and backward over a batch gave.

    Args:
        explained: the model and its inputs.
        outputs: the model's.
        values: the explained input's floats; None where no method asked for their gradient.
        gradient: the goal's with respect to them.
        layers: name → what was seen there.
        last: the site that "last map" meant; empty where no method asked for it.
    """

    explained: ExplainedInput
    outputs: Tensor
    values: Tensor | None = None
    gradient: Tensor | None = None
    layers: Mapping[str, LayerGradients] = field(default_factory=dict)
    last: str = ""


class Goal(ABC):
    """What is differentiated: one number per sample, of the outputs or of what layers give.

    Args:
        layers: names of the layers whose outputs it reads.
    """

    layers: tuple[str, ...]

    @abstractmethod
    def __call__(self, outputs: Tensor, layers: Mapping[str, Tensor], target: Target) -> Tensor:
        """Return the number to differentiate, `(n,)`."""


@dataclass(frozen=True)
class OfTarget(Goal):
    """The target's score."""

    score: Score = logit
    layers: tuple[str, ...] = ()

    def __call__(self, outputs: Tensor, layers: Mapping[str, Tensor], target: Target) -> Float[Tensor, " n"]:
        """Return the score of each sample."""
        return select(outputs, target, self.score)


class SinglePass(ABC):
    """A method that is read from one forward and one backward, which it can share with others."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Tag of the method."""

    @property
    @abstractmethod
    def goal(self) -> Goal:
        """What is differentiated."""

    @property
    def rule(self) -> ReluRule | None:
        """What ReLUs do to the gradient; None for what they do anyway."""
        return None

    @property
    def ranked_by(self) -> Ranking:
        """Which positions of its maps count as the most important; see `Explanation`."""
        return "value"

    @property
    @abstractmethod
    def at(self) -> str:
        """Where the gradient is taken: at the "input", the "last map", or a layer's name."""

    @abstractmethod
    def read(self, seen: Pass, layer: str) -> Tensor:
        """Return the maps."""

    def __call__(self, model: nn.Module, inputs: Any, target: Target, task: Task = Task()) -> Explanation:
        """Explain each sample of a batch by itself; the model is left as it was.

        Args:
            model: any module; it runs in eval mode.
            inputs: what `task.outputs(model, ...)` takes, on the model's device.
            target: class per sample `(n,)`, or a function outputs → `(n,)`.
            task: how to call the model.

        Raises:
            ValueError: the target does not fit, no gradient flows, or the layer is unknown, was not called or gives no
                map.
        """
        return explain([self], model, inputs, target, task)[0]


def explain(
    methods: Sequence[Attributor], model: nn.Module, inputs: Any, target: Target, task: Task = Task()
) -> list[Explanation]:
    """Explain a batch by several methods; those that can, share one forward and backward.

    Args:
        methods: attributors.
        model: any module; it runs in eval mode and is left as it was.
        inputs: what `task.outputs(model, ...)` takes, on the model's device.
        target: class per sample `(n,)`, or a function outputs → `(n,)`.
        task: how to call the model.

    Returns:
        One explanation per method, in their order.
    """
    shared = [method for method in methods if isinstance(method, SinglePass)]
    found: dict[int, Explanation] = {}
    if shared:
        with explaining(model):
            explained = ExplainedInput(model, inputs, task)
            for group in _groups(shared).values():
                found |= {id(method): one for method, one in _together(group, explained, target)}
    return [
        found[id(method)] if id(method) in found else method(model, inputs, target, task=task) for method in methods
    ]


def _groups(methods: Sequence[SinglePass]) -> dict[Hashable, list[SinglePass]]:
    groups: dict[Hashable, list[SinglePass]] = {}
    for method in methods:
        groups.setdefault((method.goal, method.rule), []).append(method)
    return groups


def _together(
    methods: Sequence[SinglePass], explained: ExplainedInput, target: Target
) -> list[tuple[SinglePass, Explanation]]:
    """Run one forward and backward for methods of one goal and rule, and read each from it."""
    places = list(dict.fromkeys(method.at for method in methods))
    goal, rule, layers = methods[0].goal, methods[0].rule, [place for place in places if place != INPUT]
    seen = single_pass(explained, target, goal, rule, layers, INPUT in places)
    return [(method, _read(method, seen, target)) for method in methods]


def _read(method: SinglePass, seen: Pass, target: Target) -> Explanation:
    layer = seen.last if method.at == LAST_MAP else method.at
    maps = seen.explained.kept(at_least_float32(method.read(seen, layer).detach())).cpu()
    classes = recorded(target, seen.explained.n)
    return Explanation(method.name, maps, classes, None if layer == INPUT else layer, ranked_by=method.ranked_by)


def single_pass(
    explained: ExplainedInput,
    target: Target,
    goal: Goal = OfTarget(),
    rule: ReluRule | None = None,
    layers: Sequence[str] = (),
    of_input: bool = True,
) -> Pass:
    """Run one forward, and one backward of the goal to the input and the layers; none goes below what is asked for.

    Of layers, "last map" is the one that `Trace.last_that_matters` finds in that same forward.

    Raises:
        ValueError: a layer is unknown, was not called or gives no floats; or no gradient flows.
    """
    if not (of_input or rule or goal.layers) and set(layers) == {LAST_MAP}:
        top = _of_last_map(explained, target, goal)
        if top is not None:
            return top
    named = list(dict.fromkeys([*goal.layers, *(layer for layer in layers if layer != LAST_MAP)]))
    check_layers(explained.model, named)
    kept: dict[str, Candidate] = {}
    trace = LastMapFinder(explained.n) if LAST_MAP in layers else None

    def hook(site: str, part: nn.Module, given: Tensor) -> Tensor | None:
        if site not in named:
            return trace(site, part, given) if trace else None
        held = given if given.requires_grad else given.detach().requires_grad_()
        kept[site] = Candidate(site, part, held, held._version)
        return held.clone()  # what follows may write into it

    sites = (
        watch_sites(explained.model, hook, None if trace else named) if layers or named else contextlib.nullcontext()
    )
    with relu_rule(rule), sites:
        leaf, outputs = explained.with_leaf() if of_input else (None, explained.outputs_of(explained.raw.clone()))
    if missing := [layer for layer in named if layer not in kept]:
        raise ValueError(f"layer={missing[0]!r}: expected a layer that forward calls and that gives floats, not called")
    channels = {site: positions_of(site, one.part, one.output, explained.n) for site, one in kept.items()}
    scores = goal(outputs, channels, target)
    last = trace.last_that_matters(scores) if trace else None
    wanted = [kept[layer] for layer in layers if layer != LAST_MAP] + ([last] if last else [])
    found = gradients(scores, [*(one.output for one in wanted), *([] if leaf is None else [leaf])])
    read = {one.site: _seen(one, gradient, explained.n) for one, gradient in zip(wanted, found, strict=False)}
    values, gradient = (None, None) if leaf is None else (leaf.detach(), found[-1])
    return Pass(explained, outputs.detach(), values, gradient, read, last.site if last else "")


def _of_last_map(explained: ExplainedInput, target: Target, goal: Goal) -> Pass | None:
    """Run a pass that takes no more than a forward and what is above its last map; None where that is not the layer."""
    trace = LastMapFinder(explained.n, cut=True)
    with watch_sites(explained.model, trace):
        outputs = explained.outputs_of(explained.raw.clone())
    scores = goal(outputs, {}, target)
    last = trace.last_alone(scores)
    if last is None:
        return None
    (gradient,) = gradients(scores, [last.output])
    layers = {last.site: _seen(last, gradient, explained.n)}
    return Pass(explained, outputs.detach(), layers=layers, last=last.site)


def _seen(one: Candidate, gradient: Tensor, n: int) -> LayerGradients:
    output, at = one.output.detach(), (one.site, one.part)
    return LayerGradients(positions_of(*at, output, n), positions_of(*at, gradient, n))


def check_layers(model: nn.Module, layers: Sequence[str]) -> None:
    """Raise a ValueError where a name is no layer's."""
    known = dict(model.named_modules())
    for layer in layers:
        if layer_of(layer) not in known:
            raise ValueError(f"layer={layer!r}: expected a layer of {type(model).__name__}, as in named_modules()")
