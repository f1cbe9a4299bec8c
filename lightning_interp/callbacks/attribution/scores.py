"""Numbers that say whether to trust an attribution: over epochs, against the truth, against the network itself."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_interp.attribution import (
    BestLocalizationError,
    Centre,
    DeletionArea,
    Edges,
    EnergyInside,
    InsertionArea,
    LocalizationError,
    PointingGame,
    Target,
    boxes_to_masks,
    dead,
    explain,
    importance,
    label_probability,
    logit,
    probability,
    rank_correlation,
    sanity_similarity,
)
from lightning_interp.callbacks.attribution.panels import AttributionSetup, answer_batches, fixed_targets, maps_of
from lightning_interp.data.batch import device_of, to_device
from lightning_interp.data.probe import Probe
from lightning_interp.storage.folder import Folder

M = TypeVar("M", bound=Metric)
SCORES = {"multilabel": label_probability, "regression": logit}
BASELINES = {"Centre": Centre(), "Edges": Edges()}


class Number(NamedTuple):
    """One number of one method at one moment.

    Args:
        step: optimizer steps taken.
        epoch: number of finished epochs.
        tag: what it is, `group/method` or `group/method/which`.
        value: the number.
    """

    step: int
    epoch: int
    tag: str
    value: float


def drift(before: Mapping[str, Tensor], now: Mapping[str, Tensor], mask: Tensor | None) -> dict[str, float]:
    """Return method → mean rank correlation of its maps with those of another moment; NaN where none is defined.

    Args:
        before: method → maps.
        now: likewise.
        mask: which tokens count, `(n, tokens)`; None where all do.
    """

    def counts(maps: Tensor) -> Tensor | None:
        return mask if mask is not None and mask.shape == maps.shape else None

    return {
        method: float(rank_correlation(before[method], maps, counts(maps)).nanmean())
        for method, maps in now.items()
        if method in before and before[method].shape == maps.shape
    }


def dead_shares(maps: Mapping[str, Tensor]) -> dict[str, float]:
    """Return method → share of maps that are zero everywhere, or not finite."""
    return {method: float(dead(held).float().mean()) for method, held in maps.items()}


def faithfulness_scores(module: nn.Module, inputs: Any, target: Target, asked: AttributionSetup) -> dict[str, float]:
    """Return deletion and insertion area and the sanity check of each method, and of the baselines beside them.

    Args:
        module: the network.
        inputs: of a few samples.
        target: what is explained.
        asked: the methods, and how to call the network.
    """
    images = asked.task.explained(inputs).ndim == 4
    methods = {**asked.methods, **(BASELINES if images else {})}
    found: dict[str, float] = {}
    scored = SCORES.get(asked.task.kind or "", probability)
    explanations = explain(list(methods.values()), module, inputs, target, asked.task)
    for method, explanation in zip(methods, explanations, strict=True):
        ranked = importance(methods[method], explanation)
        for group, area in (("deletion", DeletionArea), ("insertion", InsertionArea)):
            metric = _alone(area(score=scored))
            metric.update(module, inputs, ranked, target, asked.task)
            found[f"attribution_{group}/{method}"] = float(metric.compute())
    for method, attributor in asked.methods.items():
        similar = sanity_similarity(attributor, module, inputs, target, asked.task)
        found[f"attribution_sanity/{method}"] = float(similar.nanmean())
    return found


def against_truth(
    module: nn.Module, probe: Probe, asked: AttributionSetup, truth: Callable[[Any], Tensor]
) -> dict[str, float]:
    """Return how well each method's maps, and the baselines', find what the truth says is the object.

    Args:
        module: the network.
        probe: samples with a truth.
        asked: the methods, and how to call the network.
        truth: batch → masks `(n, H, W)`, or boxes `(n, 4)` as x₀, y₀, x₁, y₁ in pixels.
    """
    metrics: dict[str, list[Metric]] = {}
    for answer, batch in zip(answer_batches(module, probe, asked), probe.batches, strict=True):
        height, width = asked.task.explained(answer.inputs).shape[-2:]
        masks = _masks(truth(to_device(batch, device_of(module))), (height, width))
        chosen = fixed_targets(answer, asked.target)
        methods = {**asked.methods, **(BASELINES if asked.task.explained(answer.inputs).ndim == 4 else {})}
        for method, maps in maps_of(methods, module, answer.inputs, chosen, asked.task).items():
            for metric in metrics.setdefault(method, _localization()):
                metric.update(maps, masks)
    return {
        f"attribution_localization/{method}/{which}": float(value)
        for method, held in metrics.items()
        for metric in held
        for which, value in _named(metric).items()
    }


def _localization() -> list[Metric]:
    return [_alone(kind()) for kind in (PointingGame, EnergyInside, LocalizationError, BestLocalizationError)]


def _named(metric: Metric) -> dict[str, Tensor]:
    """Return a metric's numbers by what they are called on the board."""
    found = metric.compute()
    if isinstance(found, dict):
        return {"best_error": found["error"], "best_threshold": found["threshold"]}
    names = {PointingGame: "pointing_game", EnergyInside: "energy_inside", LocalizationError: "error_at_0.2"}
    return {names[type(metric)]: found}


def _alone(metric: M) -> M:
    """Keep a metric from waiting for other ranks: rank zero looks by itself."""
    metric.distributed_available_fn = _never
    return metric


def _never() -> bool:
    return False


def _masks(found: Any, size: tuple[int, int]) -> Tensor:
    """Return the truth as masks on the CPU.

    Raises:
        ValueError: it is neither masks of the input's size nor boxes.
    """
    if isinstance(found, Tensor) and found.ndim == 2 and found.shape[1] == 4:
        return boxes_to_masks(found.cpu(), size)
    if isinstance(found, Tensor) and found.ndim == 3 and tuple(found.shape[1:]) == size:
        return found.cpu().bool()
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise ValueError(f"truth: expected masks (n, {size[0]}, {size[1]}) or boxes (n, 4), got {shape}")


def scores_table(numbers: Iterable[Number]) -> str:
    """Return numbers as CSV."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(Number._fields)
    writer.writerows((n.step, n.epoch, n.tag, f"{n.value:.6g}") for n in numbers)
    return buffer.getvalue()


def read_scores(folder: Folder, name: str, until: int) -> list[Number]:
    """Return the numbers that a run has written, up to a step."""
    if not folder.exists(name):
        return []
    rows = csv.DictReader(io.StringIO(folder.read(name).decode()))
    held = [Number(int(r["step"]), int(r["epoch"]), r["tag"], float(r["value"])) for r in rows]
    return [number for number in held if number.step <= until]
