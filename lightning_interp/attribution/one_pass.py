"""One forward and one backward for all methods that can be read from them."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from lightning_interp.attribution.explained import Explained, gradients
from lightning_interp.attribution.layer import (
    At,
    Traced,
    last_of_pieces,
    last_that_matters,
    outputs_traced,
    positions_of,
)
from lightning_interp.attribution.relu import ReluRule, relu_rule
from lightning_interp.attribution.target import Score, Target, logit, recorded, select
from lightning_interp.batch import map_tensors, precise, tensors
from lightning_interp.capture import explaining, hooked
from lightning_interp.records import Explanation
from lightning_interp.task import Task

INPUT, LAST_MAP = "input", "last map"


class Seen(NamedTuple):
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
        last: name of the layer that "last map" meant; empty where no method asked for it.
    """

    explained: Explained
    outputs: Tensor
    values: Tensor | None = None
    gradient: Tensor | None = None
    layers: Mapping[str, Seen] = field(default_factory=dict)
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


Attributor = Callable[..., Explanation]


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
            explained = Explained(model, inputs, task)
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
    methods: Sequence[SinglePass], explained: Explained, target: Target
) -> list[tuple[SinglePass, Explanation]]:
    """Run one forward and backward for methods of one goal and rule, and read each from it."""
    places = list(dict.fromkeys(method.at for method in methods))
    layers = [place for place in places if place != INPUT]
    seen = one_pass(explained, target, methods[0].goal, methods[0].rule, layers, INPUT in places)
    return [(method, _read(method, seen, target)) for method in methods]


def _read(method: SinglePass, seen: Pass, target: Target) -> Explanation:
    layer = seen.last if method.at == LAST_MAP else method.at
    maps = seen.explained.kept(precise(method.read(seen, layer).detach())).cpu()
    return Explanation(method.name, maps, recorded(target, seen.explained.n), None if layer == INPUT else layer)


def one_pass(
    explained: Explained,
    target: Target,
    goal: Goal = OfTarget(),
    rule: ReluRule | None = None,
    layers: Sequence[str] = (),
    of_input: bool = True,
) -> Pass:
    """Run one forward, and one backward of the goal to the input and the layers; none goes below what is asked for.

    Of layers, "last map" is the one that `last_that_matters` finds in that same forward.

    Raises:
        ValueError: a layer is unknown, was not called or gives no floats; or no gradient flows.
    """
    if not (of_input or rule or goal.layers or set(layers) - {LAST_MAP}):
        top = _at_last_map(explained, target, goal)
        if top is not None:
            return top
    watched = list(dict.fromkeys([*goal.layers, *(layer for layer in layers if layer != LAST_MAP)]))
    check_layers(explained.model, watched)
    with _watched(explained.model, watched) as named, _traced(explained, LAST_MAP in layers) as maps, relu_rule(rule):
        leaf, outputs = explained.with_leaf() if of_input else (None, explained.outputs_of(explained.raw.clone()))
    if missing := [layer for layer in watched if layer not in named]:
        raise ValueError(f"layer={missing[0]!r}: expected a layer that forward calls, but it was not called")
    channels = {name: positions_of(name, at.part, at.output, explained.n) for name, at in named.items()}
    scores = goal(outputs, channels, target)
    last = last_that_matters(maps, scores) if LAST_MAP in layers else None
    at_last = last and last.at
    maps.clear()  # the backward frees what it has been through
    if last and not at_last:  # overwritten since, or not kept: a copy is taken where it is named
        again = [last.name if layer == LAST_MAP else layer for layer in layers]
        return replace(one_pass(explained, target, goal, rule, again, of_input), last=last.name)
    wanted = {name: named[name] for name in watched if name in layers} | ({at_last.name: at_last} if at_last else {})
    found = gradients(scores, [*(at.output for at in wanted.values()), *([] if leaf is None else [leaf])])
    read = {name: _seen(at, gradient, explained.n) for (name, at), gradient in zip(wanted.items(), found, strict=False)}
    values, gradient = (None, None) if leaf is None else (leaf.detach(), found[-1])
    return Pass(explained, outputs.detach(), values, gradient, read, last.name if last else "")


def _at_last_map(explained: Explained, target: Target, goal: Goal) -> Pass | None:
    """Run a pass that takes no more memory than a forward; None where the layer is not among the last of it."""
    with outputs_traced(explained.model, cut=True) as pieces:
        outputs = explained.outputs_of(explained.raw.clone())
    found = last_of_pieces(pieces, goal(outputs, {}, target)) if pieces else None
    at = found[0].at if found else None
    if found is None or at is None:
        return None
    return Pass(explained, outputs.detach(), layers={at.name: _seen(at, found[1], explained.n)}, last=at.name)


@contextlib.contextmanager
def _watched(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, At]]:
    """Collect the output of the last call of each layer, and hand on a copy, since what follows may write into it."""
    found: dict[str, At] = {}

    def hook(layer: str, part: nn.Module, _: Any, output: Any) -> Any:
        given = next(tensors(output), None)
        if given is None or not given.is_floating_point():
            raise ValueError(f"layer={layer!r}: expected a layer that gives floats, got {type(output).__name__}")
        held = given if given.requires_grad else given.detach().requires_grad_()
        found[layer] = At(layer, part, held)
        copy = held.clone()
        return map_tensors(lambda t: copy if t is given else t, output)

    with hooked(model, layers, hook):
        yield found


def _traced(explained: Explained, wanted: bool) -> contextlib.AbstractContextManager[list[Traced]]:
    return outputs_traced(explained.model) if wanted else contextlib.nullcontext([])


def _seen(at: At, gradient: Tensor, n: int) -> Seen:
    return Seen(positions_of(at.name, at.part, at.output, n).detach(), positions_of(at.name, at.part, gradient, n))


def check_layers(model: nn.Module, layers: Sequence[str]) -> None:
    """Raise a ValueError where a name is no layer's."""
    known = dict(model.named_modules())
    for layer in layers:
        if layer not in known:
            raise ValueError(f"layer={layer!r}: expected a layer of {type(model).__name__}, as in named_modules()")
