"""Samples in words: by their index, with their label and the network's prediction."""

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

# In a panel: as many as fit beside a map.
MOST_LIKELIEST_CLASSES = 3


def view_samples(model: nn.Module, task: Task, samples: Samples, display: Display) -> list[SampleView]:
    """Return samples with the network's predictions, in order."""
    views: list[SampleView] = []
    ids = samples.ids
    with torch.no_grad():
        for batch in samples:
            outputs = task.outputs(model, task.inputs(batch))
            for index in range(count_samples(batch)):  # one by one: in a list, each image has its own size
                sample = slice_samples(batch, index, index + 1)
                view = sample_views(sample, outputs[index : index + 1], task, [ids[len(views)]], display)[0]
                views.append(_without_padding(view, sample, task))
    return views


def view_by_index(
    model: nn.Module, task: Task, samples: Samples, indices: Iterable[int], display: Display
) -> dict[int, SampleView]:
    """Return dataset index → sample with the network's prediction.

    Raises:
        ValueError: an index is not one of the dataset's.
    """
    positions = {index: position for position, index in enumerate(samples.ids)}
    distinct_indices = sorted(set(indices))
    if missing := [index for index in distinct_indices if index not in positions]:
        raise ValueError(f"train_ids: expected indices of the training set, got {', '.join(map(str, missing[:8]))}")
    if not distinct_indices:
        return {}
    views = view_samples(model, task, samples.at([positions[index] for index in distinct_indices]), display)
    return dict(zip(distinct_indices, views, strict=True))


def target_in_words(target: Tensor, kind: Problem | None, display: Display) -> str:
    """Return a target in words; a class that is stored as a float is read as a class."""
    return display.label(target if kind in (None, "regression") else target.long())


def _without_padding(view: SampleView, sample: Any, task: Task) -> SampleView:
    """Return a text without its padding."""
    mask = task.mask(sample)
    value = view.value
    if mask is None or not isinstance(value, Tensor) or value.shape != mask.shape[1:]:
        return view
    return dataclasses.replace(view, value=value[mask[0].to(value.device).bool()])


def sample_views(batch: Any, outputs: Tensor, task: Task, ids: Sequence[int], display: Display) -> list[SampleView]:
    """Return a batch's samples with their true and predicted classes (or values) in words."""
    explained = task.explained(task.inputs(batch)).detach().cpu()
    outputs, targets = outputs.detach().cpu(), targets_of(batch, task)
    kind = task.problem(outputs, targets)
    classes, class_probability = predict_classes(outputs, kind)
    predictions = {"multilabel": (outputs > 0).long(), "regression": outputs}.get(kind or "", classes)
    labels = None if targets is None else targets.cpu() if kind in (None, "regression") else targets.cpu().long()
    has_classes = kind in ("classes", "binary", "multilabel")
    comparable = labels if has_classes and labels is not None and labels.numel() == predictions.numel() else None
    return [
        SampleView(
            id=display.id(index),
            value=explained[row],
            label="" if labels is None else display.label(labels[row]),
            prediction=display.label(predictions[row]),
            probability=float(class_probability[row]) if kind != "multilabel" else float("nan"),
            wrong=comparable is not None and not torch.equal(predictions[row].flatten(), comparable[row].flatten()),
            likeliest=_likeliest_classes(outputs[row : row + 1], kind, display),
        )
        for row, index in zip(range(count_samples(batch)), ids, strict=True)
    ]


def _likeliest_classes(outputs: Tensor, kind: Problem | None, display: Display) -> tuple[tuple[str, float], ...]:
    """Return the most probable classes of one sample with their probabilities; empty for tasks without classes."""
    if kind not in ("classes", "binary", "multilabel"):
        return ()
    class_probabilities = probabilities(outputs, kind)[0]
    likeliest = class_probabilities.topk(min(MOST_LIKELIEST_CLASSES, len(class_probabilities)))
    pairs = zip(likeliest.indices, likeliest.values.tolist(), strict=True)
    return tuple((display.label(index), probability) for index, probability in pairs)


def targets_of(batch: Any, task: Task) -> Tensor | None:
    """Return a batch's targets; None if it has none."""
    try:
        return task.targets(batch)
    except ValueError:
        return None


def with_dataset_names(display: Display, source: Any, inputs: Sequence[Tensor] = ()) -> Display:
    """Return the display with the dataset's own class names and normalisation, unless the user gave some.

    Args:
        display: the user's.
        source: of the samples.
        inputs: tensors of a batch; the normalisation is searched for if there are images `(n, C, H, W)` among them.
    """
    dataset = source.dataset if isinstance(source, Samples) else None
    if display.class_names is None and dataset is not None:
        display = dataclasses.replace(display, class_names=class_names(dataset))
    images = [tensor for tensor in inputs if tensor.ndim == 4 and tensor.is_floating_point()]
    normalization = normalization_of(dataset, images[0].cpu()) if display.mean is None and images else None
    return (
        display if normalization is None else dataclasses.replace(display, mean=normalization[0], std=normalization[1])
    )
