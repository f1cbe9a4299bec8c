"""What a reader is told of a sample, and the run's report of all rooms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_interp import report
from lightning_interp.batch import map_tensors, row, size
from lightning_interp.display import Display
from lightning_interp.records import Shown
from lightning_interp.samples import Samples, class_names
from lightning_interp.storage import Folder
from lightning_interp.task import Task, predicted

ROOMS = ("similarity", "similarity-2", "similarity-3", "attribution", "influence")


def shown_samples(batch: Any, outputs: Tensor, task: Task, ids: Sequence[int], display: Display) -> list[Shown]:
    """Return a batch's samples with their true and predicted classes (or values) in words."""
    inputs = map_tensors(lambda t: t.detach().cpu(), task.inputs(batch))
    outputs, targets = outputs.detach().cpu(), targets_of(batch, task)
    kind = task.problem(outputs, targets)
    chosen, chance = predicted(outputs, kind)
    said = {"multilabel": (outputs > 0).long(), "regression": outputs}.get(kind or "", chosen)
    true = None if targets is None else targets.cpu() if kind in (None, "regression") else targets.cpu().long()
    judged = true is not None and kind in ("classes", "binary", "multilabel") and true.numel() == said.numel()
    return [
        Shown(
            id=display.id(index),
            value=row(inputs, place),
            label="" if true is None else display.label(true[place]),
            prediction=display.label(said[place]),
            probability=float(chance[place]) if kind != "multilabel" else float("nan"),
            wrong=judged and not torch.equal(said[place].flatten(), _flat(true, place)),
        )
        for place, index in zip(range(size(batch)), ids, strict=True)
    ]


def _flat(true: Tensor | None, place: int) -> Tensor:
    return torch.empty(0) if true is None else true[place].flatten()


def targets_of(batch: Any, task: Task) -> Tensor | None:
    """Return a batch's targets, None where it has none."""
    try:
        return task.targets(batch)
    except ValueError:
        return None


def with_class_names(display: Display, source: Any) -> Display:
    """Return the display with the dataset's own class names, where the user gave none."""
    if display.class_names is not None or not isinstance(source, Samples):
        return display
    return dataclasses.replace(display, class_names=class_names(source.dataset))


def write_section(folder: Folder, room: str, section: str) -> None:
    """Write a room's part of the report, and the report of all rooms that have written theirs."""
    folder.write(f"{room}/section.html", section)
    sections = [folder.read(f"{r}/section.html").decode() for r in ROOMS if folder.exists(f"{r}/section.html")]
    folder.write("report.html", report.page("What the network learned", sections))
