"""Samples of a data set, by their index, as a reader sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.batch import size, take
from lightning_interp.callbacks.showing import shown_samples
from lightning_interp.display import Display
from lightning_interp.records import Shown
from lightning_interp.samples import Samples
from lightning_interp.task import Problem, Task


def look(model: nn.Module, task: Task, samples: Samples, display: Display) -> list[Shown]:
    """Return samples with what the network says of them."""
    shown: list[Shown] = []
    ids = samples.ids
    with torch.no_grad():
        for batch in samples:
            outputs = task.outputs(model, task.inputs(batch))
            for place in range(size(batch)):  # one by one: images of a list each have their own size
                one = take(batch, place, place + 1)
                held = shown_samples(one, outputs[place : place + 1], task, [ids[len(shown)]], display)[0]
                shown.append(_without_padding(held, one, task))
    return shown


def look_up(
    model: nn.Module, task: Task, samples: Samples, indices: Iterable[int], display: Display
) -> dict[int, Shown]:
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
    found = look(model, task, samples.at([places[index] for index in wanted]), display)
    return dict(zip(wanted, found, strict=True))


def worded(target: Tensor, kind: Problem | None, display: Display) -> str:
    """Return a target in words; classes that came as floats are classes."""
    return display.label(target if kind in (None, "regression") else target.long())


def _without_padding(shown: Shown, one: Any, task: Task) -> Shown:
    """Return a text without the tokens that do not count."""
    mask = task.mask(one)
    value = shown.value
    if mask is None or not isinstance(value, Tensor) or value.shape != mask.shape[1:]:
        return shown
    return dataclasses.replace(shown, value=value[mask[0].to(value.device).bool()])
