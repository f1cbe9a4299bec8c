"""What an attribution callback does with its samples at each look: keep maps, measure, find the confidently wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_interp.attribution import GradCAM, Saliency, Target, explain
from lightning_interp.attribution.results import Explanation, MapSnapshot
from lightning_interp.callbacks.attribution.arguments import OWNER
from lightning_interp.callbacks.attribution.panels import (
    AnsweredBatch,
    AttributionSetup,
    answer_batches,
    draw_panels,
    maps_of,
    of_one_size,
    reduced,
)
from lightning_interp.callbacks.attribution.scores import (
    Number,
    against_truth,
    dead_shares,
    drift,
    faithfulness_scores,
    scores_table,
)
from lightning_interp.data.batch import count_samples, device_of, single_sample, slice_samples, to_device
from lightning_interp.data.probe import Probe, subset_of_probe
from lightning_interp.data.task import Task, predict_classes
from lightning_interp.storage.attribution_maps import MapStore
from lightning_interp.storage.folder import Folder
from lightning_interp.views.canvas import Pixels
from lightning_interp.views.display import kind_of

Attributor = Callable[..., Explanation]
SCORES = "scores.csv"


@dataclass(frozen=True)
class AttributionRun:
    """What one fit goes by.

    Args:
        folder: the room's, in the run's.
        root: the run's.
        probe: the fixed samples.
        pool: samples among which the most confidently wrong are looked for; None where none are wanted.
        measured: samples with a truth; None where there is none.
        asked: what is explained, and how.
        targets: what the numbers over epochs are of, for each batch of the probe.
        store: the maps so far.
        numbers: all numbers so far.
        truth: batch → masks or boxes; None where there is none.
        scored: how many samples deletion, insertion and the sanity check are of.
        budget: bytes that the maps may take on disk.
        mask: which tokens count, `(n, tokens)`; None where all do.
    """

    folder: Folder
    root: Folder
    probe: Probe
    pool: Probe | None
    measured: Probe | None
    asked: AttributionSetup
    targets: list[Target]
    store: MapStore
    numbers: list[Number]
    truth: Callable[[Any], Tensor] | None
    scored: int
    budget: float
    mask: Tensor | None


def measure(run: AttributionRun, module: nn.Module, step: int, epoch: int, scored: bool) -> dict[str, float]:
    """Keep the maps of the fixed targets, and return the numbers of this moment.

    Args:
        run: what the fit goes by; its store and its numbers grow.
        module: the network.
        step: optimizer steps taken.
        epoch: number of finished epochs.
        scored: whether it is the turn of deletion, insertion and the sanity check.
    """
    known = {number.tag for number in run.numbers if number.step == step}
    found = {} if step in run.store.steps else _kept_and_compared(run, module, step, epoch)
    if run.scored and scored and not any(tag.startswith("attribution_deletion") for tag in known):
        found |= _trust(run, module)
    run.numbers.extend(Number(step, epoch, name, value) for name, value in found.items())
    run.folder.write(SCORES, scores_table(run.numbers))
    return found


def _kept_and_compared(run: AttributionRun, module: nn.Module, step: int, epoch: int) -> dict[str, float]:
    now = MapSnapshot(epoch, step, _fixed_maps(run, module))
    found = {f"attribution_dead/{method}": share for method, share in dead_shares(now.maps).items()}
    if run.store.steps:
        previous = drift(run.store.read(run.store.steps[-1]).maps, now.maps, run.mask)
        found |= {f"attribution_drift/{method}/to_previous": value for method, value in previous.items()}
    if run.truth is not None and run.measured is not None:
        found |= against_truth(module, run.measured, run.asked, run.truth)
    run.store.append(now)
    run.store.thin(run.budget)
    return found


def wrong_panels(run: AttributionRun, module: nn.Module, moment: str, count: int) -> dict[str, Pixels]:
    """Return panels of the most confidently wrong samples of the pool, `method/rank`."""
    if run.pool is None:
        return {}
    doubts = torch.cat([_mistaken(answer) for answer in answer_batches(module, run.pool, run.asked)])
    worst = [place for place in doubts.argsort(descending=True)[:count].tolist() if doubts[place] > 0]
    if not worst:
        return {}
    chosen = subset_of_probe(run.pool, worst)
    asked = dataclasses.replace(run.asked, scales={})
    drawn = draw_panels(module, chosen, asked, moment)
    names = [asked.display.id(index) for index in chosen.ids]
    return {
        f"{method}/{rank}": drawn[f"{method}/{name}"]
        for method in asked.methods
        for rank, name in enumerate(names, start=1)
    }


def _fixed_maps(run: AttributionRun, module: nn.Module) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {method: [] for method in run.asked.methods}
    for batch, target in zip(run.probe.batches, run.targets, strict=True):
        inputs = run.asked.task.inputs(to_device(batch, device_of(module)))
        for method, maps in maps_of(run.asked.methods, module, inputs, target, run.asked.task).items():
            parts[method].append(reduced(maps))
    return {method: torch.cat(of_one_size(held)) for method, held in parts.items()}


def _trust(run: AttributionRun, module: nn.Module) -> dict[str, float]:
    """Return deletion, insertion and the sanity check, of the first of the fixed samples: means over them."""
    totals: dict[str, float] = {}
    missing = min(run.scored, run.probe.n)
    for batch, target in zip(run.probe.batches, run.targets, strict=True):
        count = min(missing, count_samples(batch))
        if count:
            inputs = run.asked.task.inputs(to_device(slice_samples(batch, 0, count), device_of(module)))
            found = faithfulness_scores(module, inputs, target if callable(target) else target[:count], run.asked)
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + value * count
        missing -= count
    return {name: total / min(run.scored, run.probe.n) for name, total in totals.items()}


def mask_of(probe: Probe, task: Task) -> Tensor | None:
    """Return which tokens of a probe's samples count, `(n, tokens)`; None where its batches say nothing of it."""
    masks = [task.mask(task.inputs(batch)) for batch in probe.batches]
    held = [mask for mask in masks if mask is not None]
    return torch.cat(held) if held and len(held) == len(masks) else None


def _mistaken(answer: AnsweredBatch) -> Tensor:
    """Return the probability of the predicted class where it is wrong, 0 elsewhere, `(n,)`."""
    if answer.kind not in ("classes", "binary"):
        return torch.zeros(len(answer.shown))
    chance = predict_classes(answer.outputs, answer.kind)[1].cpu()
    return torch.where(torch.tensor([sample.wrong for sample in answer.shown]), chance, torch.zeros_like(chance))


def history(folder: Folder, probe: Probe, step: int, earlier: dict[str, Any]) -> MapStore:
    """Return the store of maps, with those of the run that is gone on with, up to the checkpoint's step."""
    facts = {"n": probe.n, "source": probe.source, "fingerprint": probe.fingerprint, "ids": list(probe.ids)}
    before = Folder(earlier["folder"]) if earlier else None
    history = MapStore.open(before) if before is not None and before.exists("manifest.json") else None
    if history is not None and before == folder:
        history.forget_after(step)
        return history
    store = MapStore.start(folder, facts)
    store.tidy()
    if history is not None:
        store.adopt(history.read(s) for s in history.steps if s <= step)
    return store


def default_methods(module: nn.Module, inputs: Any, task: Task) -> dict[str, Attributor]:
    """Return the default methods that work on one sample: Grad-CAM only where images pass a map or tokens."""
    methods: dict[str, Attributor] = {"Saliency": Saliency()}
    if kind_of(single_sample(task.explained(inputs), 0)) == "image":
        methods = {"GradCAM": GradCAM(), **methods}
    working, reasons = {}, []
    for name, method in methods.items():
        try:
            (found,) = explain([method], module, inputs, _first_output, task)
        except (ValueError, RuntimeError) as error:
            reasons.append(f"{name}: {error}")
        else:
            working[name] = GradCAM(found.layer) if isinstance(method, GradCAM) else method
            if found.layer:
                rank_zero_info(f"{OWNER}: {name} is read at {found.layer}")
    if not working:
        raise ValueError("; ".join(reasons))
    for reason in reasons:
        rank_zero_info(f"{OWNER} leaves a method out: {reason}")
    return working


def _first_output(outputs: Tensor) -> Tensor:
    return outputs.reshape(len(outputs), -1)[:, 0]
