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
from lightning_interp.attribution.results import Explanation
from lightning_interp.callbacks.attribution.panels import AttributionSetup, explain_probe
from lightning_interp.data.batch import device_of, to_device
from lightning_interp.data.probe import Probe
from lightning_interp.data.task import Task
from lightning_interp.storage.folder import Folder
from lightning_interp.views.tables import as_csv

M = TypeVar("M", bound=Metric)
SCORES = {"multilabel": label_probability, "regression": logit}
TRIVIAL_MAPS = {"Centre": Centre(), "Edges": Edges()}


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
    return {method: float(dead(of_method).float().mean()) for method, of_method in maps.items()}


def faithfulness_scores(
    module: nn.Module, inputs: Any, target: Target, setup: AttributionSetup, explanations: Mapping[str, Explanation]
) -> dict[str, float]:
    """Return deletion and insertion area and the sanity check of each method, and of the trivial maps beside them.

    Args:
        module: the network.
        inputs: of a few samples.
        target: what is explained.
        setup: the methods, and how to call the network.
        explanations: of these samples, by each method.
    """
    methods = {**setup.methods, **_trivial_maps(inputs, setup.task)}
    trivial = {name: method for name, method in methods.items() if name not in explanations}
    explained = {**explanations, **_explained_by(trivial, module, inputs, target, setup.task)}
    scores: dict[str, float] = {}
    score = SCORES.get(setup.task.kind or "", probability)
    for name, explanation in explained.items():
        ranked = importance(methods[name], explanation)
        for group, area in (("deletion", DeletionArea), ("insertion", InsertionArea)):
            metric = _on_this_rank_alone(area(score=score))
            metric.update(module, inputs, ranked, target, setup.task)
            scores[f"attribution_{group}/{name}"] = float(metric.compute())
    for name, method in setup.methods.items():
        similarity = sanity_similarity(method, module, inputs, target, setup.task)
        scores[f"attribution_sanity/{name}"] = float(similarity.nanmean())
    return scores


def _trivial_maps(inputs: Any, task: Task) -> dict[str, Any]:
    """Return what a method must beat: maps that depend on no network, where there are some for such inputs."""
    return TRIVIAL_MAPS if task.explained(inputs).ndim == 4 else {}


def _explained_by(
    methods: Mapping[str, Any], module: nn.Module, inputs: Any, target: Target, task: Task
) -> dict[str, Explanation]:
    return dict(zip(methods, explain(list(methods.values()), module, inputs, target, task), strict=True))


def against_truth(
    module: nn.Module, probe: Probe, setup: AttributionSetup, truth: Callable[[Any], Tensor]
) -> dict[str, float]:
    """Return how well each method's maps, and the trivial ones, find what the truth says is the object.

    Args:
        module: the network.
        probe: samples with a truth.
        setup: the methods, and how to call the network.
        truth: batch → where the object is: masks `(n, H, W)`, or boxes `(n, 4)` as x₀, y₀, x₁, y₁ in pixels.
    """
    metrics: dict[str, list[Metric]] = {}
    for explained, batch in zip(explain_probe(module, probe, setup, fixed=True), probe.batches, strict=True):
        height, width = setup.task.explained(explained.inputs).shape[-2:]
        masks = _masks(truth(to_device(batch, device_of(module))), (height, width))
        explanations = {name: one[0] for name, one in zip(setup.methods, explained.explanations, strict=True)}
        trivial = _trivial_maps(explained.inputs, setup.task)
        explanations |= _explained_by(trivial, module, explained.inputs, explained.targets[0], setup.task)
        for name, explanation in explanations.items():
            for metric in metrics.setdefault(name, _localization()):
                metric.update(explanation.maps, masks)
    return {
        f"attribution_localization/{name}/{quantity}": float(value)
        for name, of_method in metrics.items()
        for metric in of_method
        for quantity, value in _named_values(metric).items()
    }


def _localization() -> list[Metric]:
    return [
        _on_this_rank_alone(kind()) for kind in (PointingGame, EnergyInside, LocalizationError, BestLocalizationError)
    ]


def _named_values(metric: Metric) -> dict[str, Tensor]:
    """Return a metric's numbers under the names by which loggers show them."""
    value = metric.compute()
    if isinstance(value, dict):
        return {"best_error": value["error"], "best_threshold": value["threshold"]}
    names = {PointingGame: "pointing_game", EnergyInside: "energy_inside", LocalizationError: "error_at_0.2"}
    return {names[type(metric)]: value}


def _on_this_rank_alone(metric: M) -> M:
    """Keep a metric from waiting for other ranks: rank zero computes it by itself."""
    metric.distributed_available_fn = _never
    return metric


def _never() -> bool:
    return False


def _masks(truth: Any, size: tuple[int, int]) -> Tensor:
    """Return the truth as masks on the CPU.

    Raises:
        ValueError: it is neither masks of the input's size nor boxes.
    """
    if isinstance(truth, Tensor) and truth.ndim == 2 and truth.shape[1] == 4:
        return boxes_to_masks(truth.cpu(), size)
    if isinstance(truth, Tensor) and truth.ndim == 3 and tuple(truth.shape[1:]) == size:
        return truth.cpu().bool()
    shape = tuple(truth.shape) if isinstance(truth, Tensor) else type(truth).__name__
    raise ValueError(f"truth: expected masks (n, {size[0]}, {size[1]}) or boxes (n, 4), got {shape}")


def scores_table(numbers: Iterable[Number]) -> str:
    """Return numbers as CSV."""
    return as_csv(Number._fields, [(n.step, n.epoch, n.tag, f"{n.value:.6g}") for n in numbers])


def read_scores(folder: Folder, name: str, last_step: int) -> list[Number]:
    """Return the numbers that a run has written, up to a step."""
    if not folder.exists(name):
        return []
    rows = csv.DictReader(io.StringIO(folder.read(name).decode()))
    numbers = [Number(int(r["step"]), int(r["epoch"]), r["tag"], float(r["value"])) for r in rows]
    return [number for number in numbers if number.step <= last_step]
