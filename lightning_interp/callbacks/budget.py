"""How many training samples can be scored in the time there is."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn

from lightning_interp.influence import EKFAC, InfluenceFunction
from lightning_interp.influence.choice import weighted_layers
from lightning_interp.records import Influence
from lightning_interp.samples import Samples
from lightning_interp.task import Task

T = TypeVar("T")
Estimator = Callable[..., Influence]
FEW, MOST = 2, 40
TRIAL_SHARE = 0.1
SIDE_TIMED = 256


class Plan(NamedTuple):
    """What to run.

    Args:
        estimator: the one asked for, on fewer layers or with a curvature from fewer samples where the time is short.
        candidates: places in the training set to score; None for all.
        message: what was cut, in words; empty if nothing.
    """

    estimator: Estimator
    candidates: Sequence[int] | None
    message: str


class Stopwatch:
    """A `Progress` that shows nothing and notes the seconds spent on each kind of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, items: Iterable[T], total: int, what: str) -> Iterable[T]:
        """Hand the items on, timing from the first to the end."""
        started = time.perf_counter()
        yield from items
        self.seconds[what] = time.perf_counter() - started

    def of(self, start: str) -> float:
        """Return the seconds of all work whose name starts so."""
        return sum(spent for what, spent in self.seconds.items() if what.startswith(start))


def afford(
    estimator: Estimator,
    model: nn.Module,
    train: Samples,
    query: Samples,
    task: Task,
    seconds: float,
    twice: bool = False,
) -> Plan:
    """Time an estimator on a few samples, and cut its work so that all of it, the trial too, takes about `seconds`.

    Args:
        estimator: an `InfluenceFunction` is cut to the last layer where decomposing the curvature alone would take
            too long, and its curvature to samples that fit into half of the time; of any other callable the scored
            samples are cut, if it reports its progress as "curvature…" and "scoring…".
        model: the trained model.
        train: all training samples.
        query: the queries.
        task: how to call the model.
        seconds: the budget; infinite for no limit.
        twice: whether the training samples are passed over a second time, for their influence on themselves.
    """
    n, started, said = len(train), time.perf_counter(), []
    if n <= MOST or math.isinf(seconds):
        return Plan(estimator, None, "")
    if isinstance(estimator, InfluenceFunction) and _decomposition(estimator, model) > TRIAL_SHARE * seconds:
        last = weighted_layers(model)[-1]
        estimator = dataclasses.replace(estimator, layers=[last])
        said.append(f"only the parameters of {last} enter: the curvature of all layers would take too long.")
    _, cold = _timed(estimator, model, train.spread(FEW), query, task)
    trial = int(min(MOST, max(FEW, TRIAL_SHARE * seconds / (cold / FEW))))
    watch, whole = _timed(estimator, model, train.spread(trial), query, task)
    fitting, scoring = (max(1e-9, watch.of(what) / trial) for what in ("curvature", "scoring"))
    scoring *= 2 if twice else 1
    left = seconds - (time.perf_counter() - started) - (whole - trial * (fitting + scoring))
    estimator, spent = _fewer_for_curvature(estimator, n, fitting, left / 2)
    count = min(n, max(MOST, int((left - spent) / scoring)))
    if count < n:
        said.append(f"{count:,} of {n:,} training samples, evenly spread, fit into {seconds:.0f} s.")
    return Plan(estimator, None if count == n else train.places(count), " ".join(said))


def _timed(
    estimator: Estimator, model: nn.Module, train: Samples, query: Samples, task: Task
) -> tuple[Stopwatch, float]:
    watch, started = Stopwatch(), time.perf_counter()
    estimator(model, train, query, task=task, progress=watch)
    return watch, time.perf_counter() - started


def _decomposition(estimator: InfluenceFunction, model: nn.Module) -> float:
    """Estimate the seconds that the eigenvectors of all layers' factors take, from those of one small matrix."""
    if estimator.layers is not None or not isinstance(estimator.curvature, (EKFAC, type(None))):
        return 0.0
    matrix = torch.eye(SIDE_TIMED, dtype=torch.float64) + 1
    torch.linalg.eigh(matrix)
    started = time.perf_counter()
    torch.linalg.eigh(matrix)
    unit = (time.perf_counter() - started) / SIDE_TIMED**3
    weights = [cast(torch.Tensor, model.get_submodule(layer).weight) for layer in weighted_layers(model)]
    return unit * sum(w.shape[0] ** 3 + (w[0].numel() + 1) ** 3 for w in weights)


def _fewer_for_curvature(estimator: Estimator, n: int, per_sample: float, seconds: float) -> tuple[Estimator, float]:
    """Return the estimator with a curvature that fits, and the seconds that it will take."""
    if not isinstance(estimator, InfluenceFunction):
        return estimator, per_sample * n
    wanted = min(n, getattr(estimator.curvature, "samples", None) or n)
    fitting = min(wanted, max(MOST, int(seconds / per_sample)))
    if fitting < wanted:
        curvature = dataclasses.replace(cast(Any, estimator.curvature or EKFAC()), samples=fitting)
        estimator = dataclasses.replace(estimator, curvature=curvature)
    return estimator, per_sample * fitting
