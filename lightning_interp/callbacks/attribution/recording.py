"""What is recorded of attributions at each evaluation: maps of fixed targets, numbers, confidently wrong samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_interp.attribution import Attributor, GradCAM, Saliency, Target, explain
from lightning_interp.attribution.results import Explanation, MapSnapshot
from lightning_interp.callbacks.attribution.arguments import ATTRIBUTION
from lightning_interp.callbacks.attribution.panels import (
    AnsweredBatch,
    AttributionSetup,
    ExplainedBatch,
    Panel,
    answer_probe,
    explain_probe,
    explanations_of,
    panels_of,
)
from lightning_interp.callbacks.attribution.scores import (
    Number,
    against_truth,
    dead_shares,
    drift,
    faithfulness_scores,
    scores_table,
)
from lightning_interp.data.batch import single_sample, slice_samples
from lightning_interp.data.probe import Probe, subset_of_probe
from lightning_interp.data.task import Task, predict_classes
from lightning_interp.storage.attribution_maps import MapStore
from lightning_interp.storage.folder import Folder
from lightning_interp.views.display import kind_of

SCORES_FILE = "scores.csv"
# Drift and films need no more, and 8 samples of two methods then take 128 KiB an evaluation in half precision.
LARGEST_STORED_SIDE = 64


@dataclass(frozen=True)
class AttributionRun:
    """The state of one fit.

    Args:
        folder: the run's.
        room: the callback's folder in the run's.
        probe: the fixed samples.
        pool: samples among which the most confidently wrong are looked for; None where none are wanted.
        localized: samples with a truth; None where there is none.
        setup: what is explained, and how.
        targets: what the numbers over epochs are of, for each batch of the probe.
        store: the maps so far.
        numbers: all numbers so far.
        truth: batch → masks or boxes; None where there is none.
        scored: how many samples deletion, insertion and the sanity check are of.
        budget: bytes that the maps may take on disk.
        mask: which tokens count, `(n, tokens)`; None where all do.
    """

    folder: Folder
    room: str
    probe: Probe
    pool: Probe | None
    localized: Probe | None
    setup: AttributionSetup
    targets: list[Target]
    store: MapStore
    numbers: list[Number]
    truth: Callable[[Any], Tensor] | None
    scored: int
    budget: float
    mask: Tensor | None

    @property
    def own_folder(self) -> Folder:
        """The callback's folder."""
        return self.folder.folder(self.room)


def record(
    run: AttributionRun, module: nn.Module, batches: Sequence[ExplainedBatch], step: int, epoch: int, scored: bool
) -> dict[str, float]:
    """Store the maps of the fixed targets, and return the numbers of this moment.

    Args:
        run: the state of the fit; its store and its numbers grow.
        module: the network.
        batches: the probe, explained by the network as it is.
        step: optimizer steps taken.
        epoch: number of finished epochs.
        scored: whether it is the turn of deletion, insertion and the sanity check.
    """
    tags = {number.tag for number in run.numbers if number.step == step}
    stored = step in run.store.steps
    to_score = run.scored and scored and not any(tag.startswith("attribution_deletion") for tag in tags)
    if stored and not to_score:
        return {}
    explained = [
        explanations_of(batch, target, module, run.setup) for batch, target in zip(batches, run.targets, strict=True)
    ]
    values = {} if stored else _store_and_compare(run, module, explained, step, epoch)
    if to_score:
        values |= _score(run, module, batches, explained)
    run.numbers.extend(Number(step, epoch, name, value) for name, value in values.items())
    run.own_folder.write(SCORES_FILE, scores_table(run.numbers))
    return values


def _store_and_compare(
    run: AttributionRun, module: nn.Module, explained: Sequence[dict[str, Explanation]], step: int, epoch: int
) -> dict[str, float]:
    snapshot = MapSnapshot(epoch, step, _stored_maps(run.setup, explained))
    values = {f"attribution_dead/{method}": share for method, share in dead_shares(snapshot.maps).items()}
    if run.store.steps:
        previous = drift(run.store.read(run.store.steps[-1]).maps, snapshot.maps, run.mask)
        values |= {f"attribution_drift/{method}/to_previous": value for method, value in previous.items()}
    if run.truth is not None and run.localized is not None:
        values |= against_truth(module, run.localized, run.setup, run.truth)
    run.store.append(snapshot)
    run.store.thin(run.budget)
    return values


def _stored_maps(setup: AttributionSetup, explained: Sequence[dict[str, Explanation]]) -> dict[str, Tensor]:
    """Return method → maps of all samples at the size at which they are stored."""
    return {
        method: torch.cat(at_one_size([at_stored_size(by_method[method].maps) for by_method in explained]))
        for method in setup.methods
    }


def at_stored_size(maps: Tensor) -> Tensor:
    """Return maps as they are stored and compared: without channels, images of at most 64 × 64."""
    flat = maps.abs().amax(1) if maps.ndim == 4 else maps
    if flat.ndim == 3 and max(flat.shape[1:]) > LARGEST_STORED_SIDE:
        size = [min(side, LARGEST_STORED_SIDE) for side in flat.shape[1:]]
        flat = F.interpolate(flat[:, None], size, mode="area")[:, 0]
    return flat.float()


def at_one_size(maps: list[Tensor]) -> list[Tensor]:
    """Return maps of images of different sizes at one size; others as they are."""
    if len({sample_maps.shape[1:] for sample_maps in maps}) == 1 or any(sample_maps.ndim != 3 for sample_maps in maps):
        return maps
    size = (LARGEST_STORED_SIDE, LARGEST_STORED_SIDE)
    return [
        F.interpolate(sample_maps[:, None], size, mode="bilinear", align_corners=False)[:, 0] for sample_maps in maps
    ]


def _score(
    run: AttributionRun,
    module: nn.Module,
    batches: Sequence[ExplainedBatch],
    explained: Sequence[dict[str, Explanation]],
) -> dict[str, float]:
    """Return deletion, insertion and the sanity check, of the first of the fixed samples: means over them."""
    totals: dict[str, float] = {}
    scored = min(run.scored, run.probe.n)
    missing = scored
    for batch, target, by_method in zip(batches, run.targets, explained, strict=True):
        count = min(missing, len(batch.outputs))
        if count:
            inputs = batch.inputs if count == len(batch.outputs) else slice_samples(batch.inputs, 0, count)
            first = {
                name: dataclasses.replace(explanation, maps=explanation.maps[:count], target=explanation.target[:count])
                for name, explanation in by_method.items()
            }
            own_target = target if callable(target) else target[:count]
            for name, value in faithfulness_scores(module, inputs, own_target, run.setup, first).items():
                totals[name] = totals.get(name, 0.0) + value * count
        missing -= count
    return {name: total / scored for name, total in totals.items()}


def wrong_panels(run: AttributionRun, module: nn.Module, moment: str, count: int) -> dict[str, Panel]:
    """Return panels of the most confidently wrong samples of the pool, `method/rank`."""
    if run.pool is None:
        return {}
    confidence = torch.cat([_confidence_where_wrong(answer) for answer in answer_probe(module, run.pool, run.setup)])
    worst = [index for index in confidence.argsort(descending=True)[:count].tolist() if confidence[index] > 0]
    if not worst:
        return {}
    samples = subset_of_probe(run.pool, worst)
    setup = dataclasses.replace(run.setup, scales={})  # they change with the network, and share no scale over time
    panels = panels_of(explain_probe(module, samples, setup), setup, moment)
    names = [setup.display.id(index) for index in samples.ids]
    return {
        f"{method}/{rank}": panels[f"{method}/{name}"]
        for method in setup.methods
        for rank, name in enumerate(names, start=1)
    }


def _confidence_where_wrong(answer: AnsweredBatch) -> Tensor:
    """Return the probability of the predicted class where it is wrong, 0 elsewhere, `(n,)`."""
    if answer.kind not in ("classes", "binary"):
        return torch.zeros(len(answer.views))
    probability = predict_classes(answer.outputs, answer.kind)[1].cpu()
    wrong = torch.tensor([view.wrong for view in answer.views])
    return torch.where(wrong, probability, torch.zeros_like(probability))


def mask_of(probe: Probe, task: Task) -> Tensor | None:
    """Return which tokens of a probe's samples count, `(n, tokens)`; None where its batches say nothing of it."""
    masks = [task.mask(task.inputs(batch)) for batch in probe.batches]
    return torch.cat([mask for mask in masks if mask is not None]) if all(m is not None for m in masks) else None


def open_map_store(folder: Folder, probe: Probe, step: int, earlier: dict[str, Any]) -> MapStore:
    """Return the store of maps, with those of the run that is resumed, up to the checkpoint's step."""
    facts = {"n": probe.n, "source": probe.source, "fingerprint": probe.fingerprint, "ids": list(probe.ids)}
    return MapStore.resume(folder, facts, step, Folder(earlier["folder"]) if earlier else None)


def default_methods(module: nn.Module, inputs: Any, task: Task) -> dict[str, Attributor]:
    """Return the default methods that work on one sample: Grad-CAM only where images pass a map or tokens."""
    methods: dict[str, Any] = {"Saliency": Saliency()}
    if kind_of(single_sample(task.explained(inputs), 0)) == "image":
        methods = {"GradCAM": GradCAM(), **methods}
    working, reasons = {}, []
    for name, method in methods.items():
        try:
            (explanation,) = explain([method], module, inputs, _first_output, task)
        except (ValueError, RuntimeError) as error:
            reasons.append(f"{name}: {error}")
        else:
            # The layer that was found stays for the whole run, so that maps of all epochs are of the same layer.
            working[name] = dataclasses.replace(method, layer=explanation.layer) if explanation.layer else method
            if explanation.layer:
                rank_zero_info(f"{ATTRIBUTION}: {name} is read at {explanation.layer}")
    if not working:
        raise ValueError("; ".join(reasons))
    for reason in reasons:
        rank_zero_info(f"{ATTRIBUTION} leaves a method out: {reason}")
    return working


def _first_output(outputs: Tensor) -> Tensor:
    return outputs.reshape(len(outputs), -1)[:, 0]
