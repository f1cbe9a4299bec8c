"""How much of the training set can be scored in the time there is."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn

from lightning_interp.data.samples import Samples
from lightning_interp.data.task import Task
from lightning_interp.influence import EKFAC, KFAC, InfluenceFunction
from lightning_interp.influence.curvature import Curvature
from lightning_interp.influence.estimators.default_curvature import weighted_layers
from lightning_interp.influence.results import Influence

T = TypeVar("T")
Estimator = Callable[..., Influence]
FEW, MOST = 2, 40
TRIAL_SHARE = 0.1
SIDE_TIMED = 256
FORWARD = "curvature, columns"


class Plan(NamedTuple):
    """What to run.

    Args:
        estimator: the one asked for, on fewer layers or with a curvature from fewer samples where the time is short.
        message: what was cut, in words; empty if nothing.
        why: why its curvature was chosen, where it was and the estimator no longer says so itself; else empty.
    """

    estimator: Estimator
    message: str
    why: str = ""


class Stopwatch:
    """A `Progress` that shows nothing and notes the seconds spent on each kind of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, items: Iterable[T], total: int, what: str) -> Iterable[T]:
        """Hand the items on, timing from the first to the end."""
        started = time.perf_counter()
        yield from items
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    def of(self, start: str) -> float:
        """Return the seconds of all work whose name starts so."""
        return sum(spent for what, spent in self.seconds.items() if what.startswith(start))


def afford_curvature(
    estimator: InfluenceFunction, model: nn.Module, train: Samples, task: Task, seconds: float
) -> Plan:
    """Fit on a few samples, and cut the estimator's work so that its curvature takes about `seconds`.

    It is cut to the last layer where decomposing the curvature alone would take too long, and its curvature to fewer
    samples. A pass over all samples costs by the sample; where columns are sampled, what follows costs by the column.

    Args:
        estimator: that will be fitted.
        model: the trained model.
        train: all training samples.
        task: how to call the model.
        seconds: the budget; infinite for no limit.
    """
    n, said = len(train), []
    if n <= MOST or math.isinf(seconds):
        return Plan(estimator, "")
    chosen, why = estimator.chosen(model, train, task)
    if estimator.layers is None and _decomposition(chosen, model) > TRIAL_SHARE * seconds:
        last = weighted_layers(model)[-1]
        estimator = dataclasses.replace(estimator, layers=[last])
        _, why = estimator.chosen(model, train, task)
        said.append(f"only the parameters of {last} enter: the curvature of all layers would take too long.")
    watch = Stopwatch()
    try:
        trial = train.spread(_few(seconds, lambda few: estimator.fit(model, train.spread(few), task)))
        curvature = estimator.fit(model, trial, task, watch).curvature
    except (ValueError, FloatingPointError):  # a few samples may have no curvature; all may
        return Plan(estimator, " ".join(said))
    per_sample, rest = watch.of(FORWARD) / len(trial), watch.of("curvature") - watch.of(FORWARD)
    if getattr(curvature, "columns", None) is None:
        per_sample, rest = per_sample + rest / len(trial), 0.0
    wanted = min(n, getattr(curvature, "samples", None) or n)
    fitting = min(wanted, max(MOST, int((seconds - rest) / max(1e-9, per_sample))))
    if fitting == wanted or not hasattr(curvature, "samples"):
        return Plan(estimator, " ".join(said))
    estimator = dataclasses.replace(estimator, curvature=dataclasses.replace(cast(Any, curvature), samples=fitting))
    return Plan(estimator, " ".join(said), why)


def afford_scores(score: Callable[[Sequence[int]], float], train: Samples, seconds: float) -> Sequence[int] | None:
    """Score a few samples, and return places of as many as can be scored in `seconds`; None for all.

    Args:
        score: places in the training set → the seconds that scoring them took.
        train: all training samples.
        seconds: the budget; infinite for no limit.
    """
    n = len(train)
    if n <= MOST or math.isinf(seconds):
        return None
    started = time.perf_counter()
    few = _few(seconds, lambda count: score(train.spread_indices(count)))
    per_sample = max(1e-9, (score(train.spread_indices(2 * few)) - score(train.spread_indices(few))) / few)
    count = min(n, max(MOST, int((seconds - (time.perf_counter() - started)) / per_sample)))
    return None if count == n else train.spread_indices(count)


def _few(seconds: float, run: Callable[[int], Any]) -> int:
    """Return how many samples a trial may take, from the time of the first few."""
    started = time.perf_counter()
    run(FEW)
    return int(min(MOST, max(FEW, TRIAL_SHARE * seconds / ((time.perf_counter() - started) / FEW))))


def _decomposition(curvature: Curvature, model: nn.Module) -> float:
    """Estimate the seconds that the eigenvectors of all layers' factors take, from those of one small matrix."""
    if not isinstance(curvature, (EKFAC, KFAC)):
        return 0.0
    matrix = torch.eye(SIDE_TIMED, dtype=torch.float64) + 1
    torch.linalg.eigh(matrix)
    started = time.perf_counter()
    torch.linalg.eigh(matrix)
    unit = (time.perf_counter() - started) / SIDE_TIMED**3
    weights = [cast(torch.Tensor, model.get_submodule(layer).weight) for layer in weighted_layers(model)]
    return unit * sum(w.shape[0] ** 3 + (w[0].numel() + 1) ** 3 for w in weights)
