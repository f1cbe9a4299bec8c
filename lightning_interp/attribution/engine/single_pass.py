"""Methods that are read from one forward and one backward, and how several share them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_interp.attribution.attributor import Attributor
from lightning_interp.attribution.engine.backward_rule import BackwardRule
from lightning_interp.attribution.engine.explained_input import ExplainedInput
from lightning_interp.attribution.engine.forward_backward import (
    INPUT,
    LAST_MAP,
    PassResult,
    TargetChoice,
    forward_backward,
    known_target,
)
from lightning_interp.attribution.engine.target import Goal, Target, recorded
from lightning_interp.attribution.results import Explanation, Ranking
from lightning_interp.checks import tag
from lightning_interp.data.batch import at_least_float32
from lightning_interp.data.task import Task
from lightning_interp.network.undisturbed import explaining


@runtime_checkable
class ReadFromPass(Protocol):
    """What `explain` needs of a method, of any class, to let it share a forward and backward.

    Optional further members are `rule`, `ranked_by` and `facts`. `SinglePass` provides all of them and the call.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def goal(self) -> Goal: ...  # noqa: D102
    @property
    def at(self) -> str: ...  # noqa: D102

    def read(self, result: PassResult, layer: str) -> Tensor:
        """Return the maps."""


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
    def rule(self) -> BackwardRule | None:
        """What changes the backward; None for the unchanged gradient."""
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
    def read(self, result: PassResult, layer: str) -> Tensor:
        """Return the maps.

        Args:
            result: of the forward and backward.
            layer: "input", or the name of the layer in `result.layers`.
        """

    def facts(self, result: PassResult, maps: Float[Tensor, "n *shape"]) -> Mapping[str, Float[Tensor, " n"]]:
        """Return diagnostics of each map, name → `(n,)`, such as the gap of a sum that should be conserved."""
        return {}

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
        return _read_together([self], model, inputs, known_target(target), task)[id(self)]


def explain(
    methods: Sequence[Attributor], model: nn.Module, inputs: Any, target: Target, task: Task = Task()
) -> list[Explanation]:
    """Explain a batch by several methods; those that can, share one forward and backward.

    A method shares them where it has a `goal`, a place `at` which the gradient is taken and a function `read`, as every
    `SinglePass` has; methods of one goal and rule share. Any other is called by itself.

    Args:
        methods: attributors.
        model: any module; it runs in eval mode and is left as it was.
        inputs: what `task.outputs(model, ...)` takes, on the model's device.
        target: class per sample `(n,)`, or a function outputs → `(n,)`.
        task: how to call the model.

    Returns:
        One explanation per method, in their order.

    Raises:
        TypeError: a method is none, or gave something else than maps of each sample or an `Explanation`.
    """
    _check_methods(methods)
    shared = _read_together(filter(_can_share, methods), model, inputs, known_target(target), task)
    return _complete(methods, shared, model, inputs, target, task)


def explain_outputs(
    methods: Sequence[Attributor],
    model: nn.Module,
    inputs: Any,
    choose: Callable[[Tensor], Target],
    task: Task = Task(),
) -> tuple[Tensor, Target, list[Explanation]]:
    """Explain a batch for a target that depends on the outputs, and return the outputs as well.

    Methods of one goal, without a rule, take one forward and backward in all: the forward that they share also gives
    the outputs. Where no method shares one, a forward of its own does.

    Args:
        methods: attributors.
        model: any module; it runs in eval mode and is left as it was.
        inputs: what `task.outputs(model, ...)` takes, on the model's device.
        choose: outputs → target, such as the predicted class of each sample; called once, on detached outputs. It
            returns what `explain` takes as its target, so that a function it returns is explained, not called as this.
        task: how to call the model.

    Returns:
        The model's outputs, detached; the target; and one explanation per method, in their order.

    Raises:
        TypeError: as for `explain`.
    """
    _check_methods(methods)
    choice = TargetChoice(choose)
    shared = _read_together(filter(_can_share, methods), model, inputs, choice, task)
    if choice.outputs is None:
        with explaining(model), torch.no_grad():
            choice.of(task.outputs(model, inputs))
    outputs, target = choice.resolved
    return outputs, target, _complete(methods, shared, model, inputs, target, task)


def _check_methods(methods: Sequence[object]) -> None:
    for method in methods:
        if isinstance(method, type) or not (callable(method) or isinstance(method, ReadFromPass)):
            raise TypeError(f"methods: expected attributors such as Saliency(), got {method!r}")


def _can_share(method: object) -> bool:
    """Return whether a method is read from a shared pass; a class that overrides the call of `SinglePass` is called."""
    own_call = isinstance(method, SinglePass) and type(method).__call__ is not SinglePass.__call__
    # `read` must be the class's own: a wrapper that forwards attributes has it too, and its call is what counts.
    return isinstance(method, ReadFromPass) and hasattr(type(method), "read") and not own_call


def _read_together(
    methods: Iterable[Any], model: nn.Module, inputs: Any, choice: TargetChoice, task: Task
) -> dict[int, Explanation]:
    """Return the explanations of methods that can share passes, by the method's id: equal ones may be listed twice."""
    groups: dict[tuple[Goal, BackwardRule | None], list[ReadFromPass]] = {}
    for method in methods:
        groups.setdefault(_what_is_differentiated(method), []).append(method)
    explanations: dict[int, Explanation] = {}
    if groups:
        with explaining(model):
            explained = ExplainedInput(model, inputs, task)
            # Those without a rule come first: a target is then chosen on the outputs of an unchanged forward.
            for (goal, rule), group in sorted(groups.items(), key=lambda item: item[0][1] is not None):
                sites = list(dict.fromkeys(method.at for method in group))
                layers = [site for site in sites if site != INPUT]
                result = forward_backward(explained, choice, goal, rule, layers, INPUT in sites)
                explanations |= {id(method): _read_one(method, result) for method in group}
    return explanations


def _what_is_differentiated(method: Any) -> tuple[Goal, BackwardRule | None]:
    """Return a method's goal and rule, which methods that share a pass have in common."""
    goal: Goal = method.goal
    if not (isinstance(goal, Hashable) and callable(goal)):
        raise TypeError(f"{method.name}.goal: expected a hashable Goal, such as OfTarget(), got {goal!r}")
    rule = getattr(method, "rule", None)
    if not isinstance(rule, BackwardRule | None):
        raise TypeError(f"{method.name}.rule: expected a hashable BackwardRule or None, got {rule!r}")
    return goal, rule


def _read_one(method: Any, result: PassResult) -> Explanation:
    layer, n = result.last_map if method.at == LAST_MAP else method.at, result.explained.n
    maps = _of_each_sample(method.read(result, layer), n, f"{method.name}.read")
    maps = result.explained.without_padding(at_least_float32(maps))
    facts = method.facts(result, maps) if hasattr(method, "facts") else {}
    facts = {name: _of_each_sample(values, n, f"{method.name}.facts: {name}") for name, values in facts.items()}
    return Explanation(
        method.name,
        maps.cpu(),
        recorded(result.target, n),
        None if layer == INPUT else layer,
        {name: values.cpu() for name, values in facts.items()},
        getattr(method, "ranked_by", "value"),
    )


def _of_each_sample(values: Any, n: int, source: str) -> Float[Tensor, "n *shape"]:
    """Return a method's maps or facts, detached.

    Raises:
        TypeError: they are no tensor with a row for each sample.
    """
    if not isinstance(values, Tensor) or values.ndim == 0 or len(values) != n:
        shown = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)
        raise TypeError(f"{source}: expected a tensor of {n} samples, got {shown}")
    return values.detach()


def _complete(
    methods: Sequence[Attributor],
    shared: Mapping[int, Explanation],
    model: nn.Module,
    inputs: Any,
    target: Target,
    task: Task,
) -> list[Explanation]:
    """Return the explanation of each method in order; those that shared no pass are called."""
    explanations = []
    for method in methods:
        explanation = shared[id(method)] if id(method) in shared else method(model, inputs, target, task=task)
        if not isinstance(explanation, Explanation):
            raise TypeError(f"{tag(method)}: expected an Explanation, got {type(explanation).__name__}")
        explanations.append(explanation)
    return explanations
