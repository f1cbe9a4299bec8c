"""One look at samples: what the network says of them, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_interp.attribution import LIME, KernelSHAP, Target, explain
from lightning_interp.attribution.results import Explanation
from lightning_interp.callbacks.attribution.arguments import Choice
from lightning_interp.data.batch import count_samples, device_of, to_device
from lightning_interp.data.probe import Probe
from lightning_interp.data.task import Problem, Task, predict_classes, probabilities
from lightning_interp.views.attribution import TitledMap, attribution_panel, trouble
from lightning_interp.views.canvas import Pixels
from lightning_interp.views.describe import sample_views, targets_of
from lightning_interp.views.display import Display, SampleView
from lightning_interp.views.sample import scale_of

LARGEST_SIDE = 64


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
    """A batch that was looked at.

    Args:
        inputs: what the model is called with, on its device.
        outputs: the model's.
        labels: the batch's targets; None where it has none.
        kind: which problem it is.
        shown: each sample in words.
    """

    inputs: Any
    outputs: Tensor
    labels: Tensor | None
    kind: Problem | None
    shown: list[SampleView]


def answer_batches(module: nn.Module, probe: Probe, asked: AttributionSetup) -> Iterator[AnsweredBatch]:
    """Run each batch of a probe."""
    ids = list(probe.ids)
    for batch in probe.batches:
        held = to_device(batch, device_of(module))
        inputs, labels = asked.task.inputs(held), targets_of(held, asked.task)
        with torch.no_grad():
            outputs = asked.task.outputs(module, inputs)
        shown = sample_views(held, outputs, asked.task, [ids.pop(0) for _ in range(count_samples(held))], asked.display)
        yield AnsweredBatch(inputs, outputs, labels, asked.task.problem(outputs, labels), shown)


def targets(answer: AnsweredBatch, choice: Choice, classes: int) -> list[Target]:
    """Return what to explain of each sample: one target, or one for each of the likeliest classes."""
    if callable(choice):
        return [choice]
    if isinstance(choice, int):
        return [torch.full((len(answer.outputs),), choice)]
    if choice == "label":
        if answer.labels is None or not _one_class_each(answer):
            raise ValueError(f'target="label": expected one class per sample, got a problem of kind {answer.kind}')
        return [answer.labels.reshape(len(answer.outputs)).long()]
    if classes > 1 and answer.kind in ("classes", "binary", "multilabel"):
        ranked = probabilities(answer.outputs, answer.kind).argsort(dim=1, descending=True)
        return [ranked[:, place] for place in range(min(classes, ranked.shape[1]))]
    return [predict_classes(answer.outputs, answer.kind)[0]]


def fixed_targets(answer: AnsweredBatch, choice: Choice) -> Target:
    """Return what numbers over epochs are of: the label where there is one, else what is predicted at this moment."""
    if choice == "predicted" and _one_class_each(answer):
        choice = "label"
    return targets(answer, choice, 1)[0]


def _one_class_each(answer: AnsweredBatch) -> bool:
    labels = answer.labels
    return labels is not None and answer.kind in ("classes", "binary") and labels.numel() == len(answer.outputs)


def draw_panels(module: nn.Module, probe: Probe, asked: AttributionSetup, moment: str) -> dict[str, Pixels]:
    """Explain a probe's samples and draw them, `method/sample` → panel."""
    drawn: dict[str, Pixels] = {}
    for answer in answer_batches(module, probe, asked):
        chosen = targets(answer, asked.target, asked.classes)
        found = _explanations(module, answer, chosen, asked)
        for place, sample in enumerate(answer.shown):
            words = [explained_words(answer, one, place, asked.display) for one in chosen]
            for number, method in enumerate(asked.methods):
                key = f"{method}/{sample.id}"
                drawn[key] = _panel(key, sample, found[number], words, place, asked, moment)
    return drawn


def _explanations(
    module: nn.Module, answer: AnsweredBatch, chosen: Sequence[Target], asked: AttributionSetup
) -> list[list[Explanation]]:
    """Return, for each method, its explanation of each target; local models fit all classes to one set of forwards."""
    methods = list(asked.methods.values())
    if len(chosen) > 1 and (fitted := [method for method in methods if isinstance(method, (LIME, KernelSHAP))]):
        models = {id(method): method.all_classes(module, answer.inputs, asked.task) for method in fitted}
        others = iter(_by_target([m for m in methods if id(m) not in models], module, answer, chosen, asked.task))
        return [
            [models[id(m)].of(one) for one in chosen if not callable(one)] if id(m) in models else next(others)
            for m in methods
        ]
    return _by_target(methods, module, answer, chosen, asked.task)


def _by_target(
    methods: Sequence[Any], module: nn.Module, answer: AnsweredBatch, chosen: Sequence[Target], task: Task
) -> list[list[Explanation]]:
    found = [explain(methods, module, answer.inputs, target, task) for target in chosen]
    return [list(of_method) for of_method in zip(*found, strict=True)]


def _panel(
    key: str,
    sample: SampleView,
    found: Sequence[Explanation],
    words: Sequence[str],
    place: int,
    asked: AttributionSetup,
    moment: str,
) -> Pixels:
    maps = [TitledMap(word, one.maps[place]) for word, one in zip(words, found, strict=True)]
    top = max([asked.scales.get(key, 0.0), *(scale_of(one.map) for one in maps if not trouble(one.map))])
    asked.scales[key] = top
    layer = f" at {found[0].layer}" if found[0].layer else ""
    facts = "".join(f", {name.replace('_', ' ')} {float(value[place]):.2g}" for name, value in found[0].facts.items())
    title = f"{key.split('/')[0]} of {', '.join(words)}{layer}, {moment}{facts}"
    return attribution_panel(sample, maps, title, asked.display, top)


def maps_of(
    methods: Mapping[str, Any], module: nn.Module, inputs: Any, target: Target, task: Task
) -> dict[str, Tensor]:
    """Explain a batch by each method."""
    found = explain(list(methods.values()), module, inputs, target, task)
    return {name: one.maps for name, one in zip(methods, found, strict=True)}


def reduced(maps: Tensor) -> Tensor:
    """Return maps as they are kept and compared: without channels, images of at most 64 × 64."""
    flat = maps.abs().amax(1) if maps.ndim == 4 else maps
    if flat.ndim == 3 and max(flat.shape[1:]) > LARGEST_SIDE:
        size = [min(side, LARGEST_SIDE) for side in flat.shape[1:]]
        flat = F.interpolate(flat[:, None], size, mode="area")[:, 0]
    return flat.float()


def of_one_size(maps: list[Tensor]) -> list[Tensor]:
    """Return maps of images of different sizes at one size; others as they are."""
    if len({held.shape[1:] for held in maps}) == 1 or any(held.ndim != 3 for held in maps):
        return maps
    size = (LARGEST_SIDE, LARGEST_SIDE)
    return [F.interpolate(m[:, None], size, mode="bilinear", align_corners=False)[:, 0] for m in maps]


def explained_words(answer: AnsweredBatch, target: Target, place: int, display: Display) -> str:
    """Return what the map explains, in words: a class, an output of a regression, or a function's name."""
    if callable(target):
        return getattr(target, "__name__", "the given function")
    index = target[place]
    if answer.kind != "regression":
        return display.label(index)
    return "the output" if answer.outputs[0].numel() == 1 else f"output {int(index)}"
