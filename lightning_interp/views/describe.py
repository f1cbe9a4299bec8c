"""Samples as a reader sees them: by their index, with what the network answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.data.batch import count_samples, slice_samples
from lightning_interp.data.normalization import normalization_of
from lightning_interp.data.samples import Samples, class_names
from lightning_interp.data.task import Problem, Task, predict_classes, probabilities
from lightning_interp.views.display import Display, SampleView

SHOWN_CLASSES = 3


def view_samples(model: nn.Module, task: Task, samples: Samples, display: Display) -> list[SampleView]:
    """Return samples with what the network says of them."""
    views: list[SampleView] = []
    ids = samples.ids
    with torch.no_grad():
        for batch in samples:
            outputs = task.outputs(model, task.inputs(batch))
            for place in range(count_samples(batch)):  # one by one: images of a list each have their own size
                one = slice_samples(batch, place, place + 1)
                held = sample_views(one, outputs[place : place + 1], task, [ids[len(views)]], display)[0]
                views.append(_without_padding(held, one, task))
    return views


def view_by_index(
    model: nn.Module, task: Task, samples: Samples, indices: Iterable[int], display: Display
) -> dict[int, SampleView]:
    """Return the samples with these dataset indices, each under its index.

    Raises:
        ValueError: an index is not one of the data set's.
    """
    places = {index: place for place, index in enumerate(samples.ids)}
    wanted = sorted(set(indices))
    if missing := [index for index in wanted if index not in places]:
        raise ValueError(f"train_ids: expected indices of the training set, got {', '.join(map(str, missing[:8]))}")
    if not wanted:
        return {}
    found = view_samples(model, task, samples.at([places[index] for index in wanted]), display)
    return dict(zip(wanted, found, strict=True))


def target_in_words(target: Tensor, kind: Problem | None, display: Display) -> str:
    """Return a target in words; classes that came as floats are classes."""
    return display.label(target if kind in (None, "regression") else target.long())


def _without_padding(view: SampleView, one: Any, task: Task) -> SampleView:
    """Return a text without the tokens that do not count."""
    mask = task.mask(one)
    value = view.value
    if mask is None or not isinstance(value, Tensor) or value.shape != mask.shape[1:]:
        return view
    return dataclasses.replace(view, value=value[mask[0].to(value.device).bool()])


def sample_views(batch: Any, outputs: Tensor, task: Task, ids: Sequence[int], display: Display) -> list[SampleView]:
    """Return a batch's samples with their true and predicted classes (or values) in words."""
    explained = task.explained(task.inputs(batch)).detach().cpu()
    outputs, targets = outputs.detach().cpu(), targets_of(batch, task)
    kind = task.problem(outputs, targets)
    chosen, chance = predict_classes(outputs, kind)
    said = {"multilabel": (outputs > 0).long(), "regression": outputs}.get(kind or "", chosen)
    true = None if targets is None else targets.cpu() if kind in (None, "regression") else targets.cpu().long()
    judged = true is not None and kind in ("classes", "binary", "multilabel") and true.numel() == said.numel()
    return [
        SampleView(
            id=display.id(index),
            value=explained[place],
            label="" if true is None else display.label(true[place]),
            prediction=display.label(said[place]),
            probability=float(chance[place]) if kind != "multilabel" else float("nan"),
            wrong=judged and not torch.equal(said[place].flatten(), _flat(true, place)),
            likeliest=_likeliest_classes(outputs[place : place + 1], kind, display),
        )
        for place, index in zip(range(count_samples(batch)), ids, strict=True)
    ]


def _likeliest_classes(outputs: Tensor, kind: Problem | None, display: Display) -> tuple[tuple[str, float], ...]:
    """Return the most probable classes of one sample with their probabilities; none where there are no classes."""
    if kind not in ("classes", "binary", "multilabel"):
        return ()
    chances = probabilities(outputs, kind)[0]
    best = chances.topk(min(SHOWN_CLASSES, len(chances)))
    pairs = zip(best.indices, best.values.tolist(), strict=True)
    return tuple((display.label(index), chance) for index, chance in pairs)


def _flat(true: Tensor | None, place: int) -> Tensor:
    return torch.empty(0) if true is None else true[place].flatten()


def targets_of(batch: Any, task: Task) -> Tensor | None:
    """Return a batch's targets, None where it has none."""
    try:
        return task.targets(batch)
    except ValueError:
        return None


def with_dataset_names(display: Display, source: Any, inputs: Sequence[Tensor] = ()) -> Display:
    """Return the display with the dataset's own class names and normalisation, where the user gave none.

    Args:
        display: the user's.
        source: where the samples come from.
        inputs: some of them, images `(n, C, H, W)` among them.
    """
    dataset = source.dataset if isinstance(source, Samples) else None
    if display.class_names is None and dataset is not None:
        display = dataclasses.replace(display, class_names=class_names(dataset))
    images = [held for held in inputs if held.ndim == 4 and held.is_floating_point()]
    found = normalization_of(dataset, images[0].cpu()) if display.mean is None and images else None
    return display if found is None else dataclasses.replace(display, mean=found[0], std=found[1])
