"""A probe's samples explained in one forward and one backward, and drawn: what the network answers, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp.attribution import ExplainsAllClasses, Target, explain
from lightning_interp.attribution.engine.single_pass import explain_outputs
from lightning_interp.attribution.results import Explanation
from lightning_interp.callbacks.attribution.arguments import Choice
from lightning_interp.data.batch import count_samples, device_of, select_samples, to_device
from lightning_interp.data.probe import Probe
from lightning_interp.data.task import Problem, Task, predict_classes, probabilities
from lightning_interp.views.attribution import TitledMap, attribution_panel, reason_not_drawn
from lightning_interp.views.canvas import Pixels
from lightning_interp.views.describe import sample_views, targets_of
from lightning_interp.views.display import Display, SampleView
from lightning_interp.views.sample import scale_of


@dataclass(frozen=True)
class AttributionSetup:
    """What is explained, by which methods, how it is read and shown.

    Args:
        methods: tag → attributor.
        task: how to read a batch and call the model; its kind settled.
        display: how samples are shown.
        target: what is explained of each sample.
        classes: maps for so many of the likeliest classes.
        scales: method and sample → the largest value that its maps have had, which is the end of the colour scale.
    """

    methods: Mapping[str, Any]
    task: Task
    display: Display
    target: Choice
    classes: int
    scales: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class AnsweredBatch:
    """A batch with the network's answers.

    Args:
        inputs: what the model is called with, on its device.
        outputs: the model's.
        labels: the batch's targets; None where it has none.
        kind: which problem it is.
        views: each sample in words.
    """

    inputs: Any
    outputs: Tensor
    labels: Tensor | None
    kind: Problem | None
    views: list[SampleView]


@dataclass(frozen=True, eq=False)
class ExplainedBatch(AnsweredBatch):
    """A batch with the network's answers and their explanations.

    Args:
        targets: what is explained: one target, or one for each of the likeliest classes.
        explanations: for each method its explanation of each target.
    """

    targets: list[Target]
    explanations: list[list[Explanation]]


class Panel(NamedTuple):
    """What is drawn of one sample and method (see `attribution_panel`)."""

    view: SampleView
    maps: Sequence[TitledMap]
    title: str
    display: Display
    top: float

    def draw(self) -> Pixels:
        """Return the drawing."""
        return attribution_panel(*self)


def answer_probe(module: nn.Module, probe: Probe, setup: AttributionSetup) -> Iterator[AnsweredBatch]:
    """Run each batch of a probe, without explaining it."""
    for batch, ids in _batches_with_ids(module, probe):
        with torch.no_grad():
            outputs = setup.task.outputs(module, setup.task.inputs(batch))
        yield _answered(batch, outputs, ids, setup)


def explain_probe(
    module: nn.Module, probe: Probe, setup: AttributionSetup, fixed: bool = False
) -> Iterator[ExplainedBatch]:
    """Run and explain each batch of a probe.

    The forward that methods take their gradients from also gives the answers, which say what is explained; only maps of
    several classes take a forward of their own for them.

    Args:
        module: the network.
        probe: the samples.
        setup: the methods, and how to call the network.
        fixed: explain the target that numbers over epochs are of (see `fixed_target`) instead of `setup.target`.
    """
    for batch, ids in _batches_with_ids(module, probe):
        if setup.classes == 1 or fixed:
            yield _explained_in_one_pass(module, batch, ids, setup, fixed)
            continue
        with torch.no_grad():
            outputs = setup.task.outputs(module, setup.task.inputs(batch))
        answer = _answered(batch, outputs, ids, setup)
        targets = targets_to_explain(answer, setup.target, setup.classes)
        yield ExplainedBatch(
            **vars(answer), targets=targets, explanations=_explanations(module, answer, targets, setup)
        )


def _explained_in_one_pass(
    module: nn.Module, batch: Any, ids: Sequence[int], setup: AttributionSetup, fixed: bool
) -> ExplainedBatch:
    answers: list[AnsweredBatch] = []

    def choose(outputs: Tensor) -> Target:
        answers.append(_answered(batch, outputs, ids, setup))
        if fixed:
            return fixed_target(answers[0], setup.target)
        return targets_to_explain(answers[0], setup.target, 1)[0]

    methods, inputs = list(setup.methods.values()), setup.task.inputs(batch)
    _, target, explanations = explain_outputs(methods, module, inputs, choose, setup.task)
    return ExplainedBatch(**vars(answers[0]), targets=[target], explanations=[[one] for one in explanations])


def _batches_with_ids(module: nn.Module, probe: Probe) -> Iterator[tuple[Any, list[int]]]:
    """Yield each batch on the module's device, with its samples' dataset indices."""
    start = 0
    for batch in probe.batches:
        stop = start + count_samples(batch)
        yield to_device(batch, device_of(module)), list(probe.ids[start:stop])
        start = stop


def _answered(batch: Any, outputs: Tensor, ids: Sequence[int], setup: AttributionSetup) -> AnsweredBatch:
    labels = targets_of(batch, setup.task)
    views = sample_views(batch, outputs, setup.task, ids, setup.display)
    return AnsweredBatch(setup.task.inputs(batch), outputs, labels, setup.task.problem(outputs, labels), views)


def targets_to_explain(answer: AnsweredBatch, choice: Choice, classes: int) -> list[Target]:
    """Return what to explain of each sample: one target, or one for each of the likeliest classes."""
    if callable(choice):
        return [choice]
    if isinstance(choice, int):
        return [torch.full((len(answer.outputs),), choice)]
    if choice == "label":
        if answer.labels is None or not _has_one_class_each(answer):
            raise ValueError(f'target="label": expected one class per sample, got a problem of kind {answer.kind}')
        return [answer.labels.reshape(len(answer.outputs)).long()]
    if classes > 1 and answer.kind in ("classes", "binary", "multilabel"):
        ranked = probabilities(answer.outputs, answer.kind).argsort(dim=1, descending=True)
        return [ranked[:, rank] for rank in range(min(classes, ranked.shape[1]))]
    return [predict_classes(answer.outputs, answer.kind)[0]]


def fixed_target(answer: AnsweredBatch, choice: Choice) -> Target:
    """Return what numbers over epochs are of: the label where there is one, else what is predicted at this moment."""
    if choice == "predicted" and _has_one_class_each(answer):
        choice = "label"
    return targets_to_explain(answer, choice, 1)[0]


def _has_one_class_each(answer: AnsweredBatch) -> bool:
    labels = answer.labels
    return labels is not None and answer.kind in ("classes", "binary") and labels.numel() == len(answer.outputs)


def explanations_of(
    batch: ExplainedBatch, target: Target, module: nn.Module, setup: AttributionSetup
) -> dict[str, Explanation]:
    """Return each method's explanation of a target; only samples of which another one was explained are run again.

    Args:
        batch: explained samples.
        target: class per sample `(n,)`, or a function of the outputs.
        module: the network, in the state in which the batch was explained.
        setup: the methods, and how to call the network.
    """
    explained = batch.targets[0]
    first = {name: by_target[0] for name, by_target in zip(setup.methods, batch.explanations, strict=True)}
    if callable(target) or callable(explained):
        if target is explained:
            return first
        rows = torch.arange(len(batch.outputs))
    else:
        rows = (target.cpu() != explained.cpu()).nonzero()[:, 0]
    if not len(rows):
        return first
    inputs = batch.inputs if len(rows) == len(batch.outputs) else select_samples(batch.inputs, rows)
    own_target = target if callable(target) else target[rows.to(target.device)]
    again = explain(list(setup.methods.values()), module, inputs, own_target, setup.task)
    return {
        name: _with_rows_replaced(first[name], rows, other) for name, other in zip(setup.methods, again, strict=True)
    }


def _with_rows_replaced(explanation: Explanation, rows: Tensor, other: Explanation) -> Explanation:
    if len(rows) == len(explanation.maps):
        return other

    def replaced(values: Tensor, new: Tensor) -> Tensor:
        return values.index_copy(0, rows.to(values.device), new.to(values))

    facts = {name: replaced(values, other.facts[name]) for name, values in explanation.facts.items()}
    maps, target = replaced(explanation.maps, other.maps), replaced(explanation.target, other.target)
    return dataclasses.replace(explanation, maps=maps, target=target, facts=facts)


def panels_of(batches: Iterable[ExplainedBatch], setup: AttributionSetup, moment: str) -> dict[str, Panel]:
    """Return what is drawn of explained samples, `method/sample` → panel; the colour scales grow with the maps."""
    panels: dict[str, Panel] = {}
    for batch in batches:
        for index, view in enumerate(batch.views):
            words = [explained_in_words(batch, target, index, setup.display) for target in batch.targets]
            for method, explanations in zip(setup.methods, batch.explanations, strict=True):
                key = f"{method}/{view.id}"
                panels[key] = _panel(key, view, explanations, words, index, setup, moment)
    return panels


def _explanations(
    module: nn.Module, answer: AnsweredBatch, targets: Sequence[Target], setup: AttributionSetup
) -> list[list[Explanation]]:
    """Return, for each method, its explanation of each target, of all targets together where it can."""
    methods = list(setup.methods.values())
    together = [method for method in methods if len(targets) > 1 and isinstance(method, ExplainsAllClasses)]
    models = {id(method): method.all_classes(module, answer.inputs, setup.task) for method in together}
    others = iter(_by_target([m for m in methods if id(m) not in models], module, answer, targets, setup.task))
    return [
        [models[id(method)].of(target) for target in targets if not callable(target)]
        if id(method) in models
        else next(others)
        for method in methods
    ]


def _by_target(
    methods: Sequence[Any], module: nn.Module, answer: AnsweredBatch, targets: Sequence[Target], task: Task
) -> list[list[Explanation]]:
    by_target = [explain(methods, module, answer.inputs, target, task) for target in targets]
    return [list(of_method) for of_method in zip(*by_target, strict=True)]


def _panel(
    key: str,
    view: SampleView,
    explanations: Sequence[Explanation],
    words: Sequence[str],
    index: int,
    setup: AttributionSetup,
    moment: str,
) -> Panel:
    maps = [TitledMap(word, one.maps[index]) for word, one in zip(words, explanations, strict=True)]
    top = max([setup.scales.get(key, 0.0), *(scale_of(one.map) for one in maps if not reason_not_drawn(one.map))])
    setup.scales[key] = top
    layer, facts = explanations[0].layer, explanations[0].facts
    at = f" at {layer}" if layer else ""
    numbers = "".join(f", {name.replace('_', ' ')} {float(value[index]):.2g}" for name, value in facts.items())
    title = f"{key.split('/')[0]} of {', '.join(words)}{at}, {moment}{numbers}"
    return Panel(view, maps, title, setup.display, top)


def explained_in_words(answer: AnsweredBatch, target: Target, index: int, display: Display) -> str:
    """Return what a sample's map explains, in words: a class, an output of a regression, or a function's name."""
    if callable(target):
        return getattr(target, "__name__", "the given function")
    if answer.kind != "regression":
        return display.label(target[index])
    return "the output" if answer.outputs[0].numel() == 1 else f"output {int(target[index])}"
