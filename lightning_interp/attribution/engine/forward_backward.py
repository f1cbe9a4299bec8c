"""One forward and one backward over a batch: what the input and the layers hold, and the gradients there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from lightning_interp.attribution.engine.backward_rule import BackwardRule
from lightning_interp.attribution.engine.explained_input import ExplainedInput, gradients
from lightning_interp.attribution.engine.last_map import Candidate, LastMapFinder, positions_of
from lightning_interp.attribution.engine.sites import layer_of, watch_sites
from lightning_interp.attribution.engine.target import Goal, Target

INPUT, LAST_MAP = "input", "last map"


class LayerGradients(NamedTuple):
    """A layer's output, channels first, and the goal's gradient with respect to it."""

    activations: Float[Tensor, "n c *positions"]
    gradients: Float[Tensor, "n c *positions"]


@dataclass(frozen=True, eq=False)
class PassResult:
    """What one forward and backward over a batch gave.

    Args:
        explained: the model and its inputs.
        target: what was explained.
        outputs: the model's, detached.
        values: the explained input's floats; None where their gradient was not taken.
        gradient: the goal's with respect to them.
        layers: name → the layer's output and gradient.
        last_map: the site that was found for `LAST_MAP`; empty where it was not among the layers.
    """

    explained: ExplainedInput
    target: Target
    outputs: Tensor
    values: Tensor | None = None
    gradient: Tensor | None = None
    layers: Mapping[str, LayerGradients] = field(default_factory=dict)
    last_map: str = ""


@dataclass(eq=False)
class TargetChoice:
    """A target that is chosen once, on the outputs of the first forward.

    Args:
        choose: outputs → target: a class per sample, or a function as `Target` allows.
    """

    choose: Callable[[Tensor], Target]
    outputs: Tensor | None = None
    target: Target | None = None

    def of(self, outputs: Tensor) -> Target:
        """Return the target, which the first outputs decide."""
        if self.target is None:
            # A copy, since `choose` may write into it and the goal still needs the original.
            self.outputs = outputs.detach().clone()
            self.target = self.choose(self.outputs)
            if self.target is None:
                raise TypeError("choose: expected class indices or a function of outputs, got None")
        return self.target

    @property
    def resolved(self) -> tuple[Tensor, Target]:
        """The outputs and the target chosen on them.

        Raises:
            RuntimeError: nothing was chosen yet.
        """
        if self.outputs is None or self.target is None:
            raise RuntimeError("no forward has been run for this choice")
        return self.outputs, self.target


def known_target(target: Target) -> TargetChoice:
    """Return a choice of a target that is known beforehand."""
    return TargetChoice(lambda _: target, target=target)


def forward_backward(
    explained: ExplainedInput,
    choice: TargetChoice,
    goal: Goal,
    rule: BackwardRule | None = None,
    layers: Sequence[str] = (),
    of_input: bool = True,
) -> PassResult:
    """Run one forward, and one backward of the goal that goes no deeper than the layers and the input need.

    Args:
        explained: the model and its inputs.
        choice: what the goal is a number of, which may follow from the outputs of this forward.
        goal: what is differentiated.
        rule: changes the backward; the unchanged gradient when None.
        layers: where gradients are taken; `LAST_MAP` is the one that `LastMapFinder` finds in that same forward.
        of_input: whether to take the input's gradient.

    Raises:
        ValueError: a layer is unknown, was not called or gives no floats; or no gradient flows.
    """
    # Class activation maps alone need no graph below the last map, whose memory is then freed.
    if not (of_input or rule or goal.layers) and set(layers) == {LAST_MAP}:
        result = _above_last_map(explained, choice, goal)
        if result is not None:
            return result
    layer_names = list(dict.fromkeys([*goal.layers, *(layer for layer in layers if layer != LAST_MAP)]))
    check_layers(explained.model, layer_names)
    finder = LastMapFinder(explained.n) if LAST_MAP in layers else None
    candidates: dict[str, Candidate] = {}
    with contextlib.ExitStack() as contexts:
        # The rule is the outer one of two modes, so that a layer's output is recorded as the rule returns it.
        contexts.enter_context(rule.opened() if rule else contextlib.nullcontext())
        if layer_names or finder:
            hook = _layer_hook(layer_names, candidates, finder)
            contexts.enter_context(watch_sites(explained.model, hook, None if finder else layer_names))
        leaf, outputs = explained.with_leaf() if of_input else (None, explained.outputs_of(explained.raw.clone()))
    _check_called(layer_names, candidates)
    activations = {site: positions_of(site, c.module, c.output, explained.n) for site, c in candidates.items()}
    target = choice.of(outputs)
    scores = goal(outputs, activations, target)
    last = finder.last_that_matters(scores) if finder else None
    differentiated = [candidates[layer] for layer in layers if layer != LAST_MAP] + ([last] if last else [])
    tensors = [*(candidate.output for candidate in differentiated), *([] if leaf is None else [leaf])]
    layer_gradients = gradients(scores, tensors)
    by_site = {
        candidate.site: _layer_gradients(candidate, gradient, explained.n)
        for candidate, gradient in zip(differentiated, layer_gradients, strict=False)  # the last one may be the input's
    }
    values, gradient = (None, None) if leaf is None else (leaf.detach(), layer_gradients[-1])
    return PassResult(explained, target, outputs.detach(), values, gradient, by_site, last.site if last else "")


def check_layers(model: nn.Module, layers: Sequence[str]) -> None:
    """Raise a ValueError where a name is no layer's."""
    submodules = dict(model.named_modules())
    for layer in layers:
        if layer_of(layer) not in submodules:
            raise ValueError(f"layer={layer!r}: expected a layer of {type(model).__name__}, as in named_modules()")


def _above_last_map(explained: ExplainedInput, choice: TargetChoice, goal: Goal) -> PassResult | None:
    """Run a forward, and the backward above its last map alone; None where that map is not the layer."""
    finder = LastMapFinder(explained.n, cut=True)
    with watch_sites(explained.model, finder):
        outputs = explained.outputs_of(explained.raw.clone())
    target = choice.of(outputs)
    scores = goal(outputs, {}, target)
    last = finder.last_alone(scores)
    if last is None:
        return None
    (gradient,) = gradients(scores, [last.output])
    layers = {last.site: _layer_gradients(last, gradient, explained.n)}
    return PassResult(explained, target, outputs.detach(), layers=layers, last_map=last.site)


def _layer_hook(
    layer_names: Sequence[str], candidates: dict[str, Candidate], finder: LastMapFinder | None
) -> Callable[[str, nn.Module, Tensor], Tensor | None]:
    """Return a hook that notes what the named layers give, and shows the finder everything else."""

    def hook(site: str, module: nn.Module, output: Tensor) -> Tensor | None:
        if site not in layer_names:
            return finder(site, module, output) if finder else None
        output = output if output.requires_grad else output.detach().requires_grad_()
        candidates[site] = Candidate(site, module, output, output._version)
        return output.clone()  # what follows may write into it

    return hook


def _check_called(layer_names: Sequence[str], candidates: Mapping[str, Candidate]) -> None:
    if missing := [layer for layer in layer_names if layer not in candidates]:
        raise ValueError(f"layer={missing[0]!r}: expected a layer that forward calls and that gives floats, not called")


def _layer_gradients(candidate: Candidate, gradient: Tensor, n: int) -> LayerGradients:
    site, module = candidate.site, candidate.module
    output = candidate.output.detach()
    return LayerGradients(positions_of(site, module, output, n), positions_of(site, module, gradient, n))
