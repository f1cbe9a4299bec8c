"""What a reader is told of a sample, and the run's report of all rooms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_interp import report
from lightning_interp.batch import size
from lightning_interp.display import Display
from lightning_interp.normalization import normalization_of
from lightning_interp.records import Shown
from lightning_interp.samples import Samples, class_names
from lightning_interp.storage import Folder
from lightning_interp.task import Problem, Task, predicted, probabilities

SHOWN_CLASSES = 3
ROOMS = (*(f"{room}{number}" for room in ("similarity", "attribution") for number in ("", "-2", "-3")), "influence")


def shown_samples(batch: Any, outputs: Tensor, task: Task, ids: Sequence[int], display: Display) -> list[Shown]:
    """Return a batch's samples with their true and predicted classes (or values) in words."""
    explained = task.explained(task.inputs(batch)).detach().cpu()
    outputs, targets = outputs.detach().cpu(), targets_of(batch, task)
    kind = task.problem(outputs, targets)
    chosen, chance = predicted(outputs, kind)
    said = {"multilabel": (outputs > 0).long(), "regression": outputs}.get(kind or "", chosen)
    true = None if targets is None else targets.cpu() if kind in (None, "regression") else targets.cpu().long()
    judged = true is not None and kind in ("classes", "binary", "multilabel") and true.numel() == said.numel()
    return [
        Shown(
            id=display.id(index),
            value=explained[place],
            label="" if true is None else display.label(true[place]),
            prediction=display.label(said[place]),
            probability=float(chance[place]) if kind != "multilabel" else float("nan"),
            wrong=judged and not torch.equal(said[place].flatten(), _flat(true, place)),
            likeliest=_likeliest(outputs[place : place + 1], kind, display),
        )
        for place, index in zip(range(size(batch)), ids, strict=True)
    ]


def _likeliest(outputs: Tensor, kind: Problem | None, display: Display) -> tuple[tuple[str, float], ...]:
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


def as_the_data_says(display: Display, source: Any, inputs: Sequence[Tensor] = ()) -> Display:
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


def write_section(folder: Folder, room: str, section: str) -> None:
    """Write a room's part of the report, and the report of all rooms that have written theirs."""
    folder.write(f"{room}/section.html", section)
    sections = [folder.read(f"{r}/section.html").decode() for r in ROOMS if folder.exists(f"{r}/section.html")]
    folder.write("report.html", report.page("What the network learned", sections))
