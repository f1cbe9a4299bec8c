"""How many training samples can be scored in the time there is."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from torch import nn

from lightning_interp.influence import InfluenceFunction
from lightning_interp.records import Influence
from lightning_interp.samples import Samples
from lightning_interp.task import Task

Estimator = Callable[..., Influence]
FEW, MORE = 8, 40


class Plan(NamedTuple):
    """What to run.

    Args:
        estimator: the one asked for, its curvature from fewer samples where the time is short.
        candidates: places in the training set to score; None for all.
        message: what was cut, in words; empty if nothing.
    """

    estimator: Estimator
    candidates: Sequence[int] | None
    message: str


def afford(estimator: Estimator, model: nn.Module, train: Samples, query: Samples, task: Task, seconds: float) -> Plan:
    """Time an estimator on a few samples, and cut its work so that it takes about `seconds`.

    Args:
        estimator: of an `InfluenceFunction`, the curvature's samples are cut to half of the time.
        model: the trained model.
        train: all training samples.
        query: the queries.
        task: how to call the model.
        seconds: the budget; infinite for no limit.
    """
    n = len(train)
    if n <= MORE or math.isinf(seconds):
        return Plan(estimator, None, "")
    few, more = train.spread(FEW), train.spread(MORE)

    def timed(samples: Samples, candidates: Sequence[int] | None = None) -> float:
        started = time.perf_counter()
        estimator(model, samples, query, task=task, candidates=candidates)
        return time.perf_counter() - started

    timed(few)
    base, fitted, scored = timed(few), timed(more, range(FEW)), timed(more)
    fitting, scoring = (max(1e-9, s / (MORE - FEW)) for s in (fitted - base, scored - fitted))
    estimator, spent = _fewer_for_curvature(estimator, n, fitting, seconds / 2)
    left = max(0.0, seconds - base - spent)
    count = min(n, max(MORE, int(left / scoring)))
    if count == n:
        return Plan(estimator, None, "")
    places = [round(i * (n - 1) / (count - 1)) for i in range(count)]
    return Plan(estimator, places, f"{count:,} of {n:,} training samples, evenly spread, fit into {seconds:.0f} s.")


def _fewer_for_curvature(estimator: Estimator, n: int, per_sample: float, seconds: float) -> tuple[Estimator, float]:
    """Return the estimator with a curvature that fits, and the seconds that it will take."""
    if not isinstance(estimator, InfluenceFunction):
        return estimator, 0.0
    wanted = min(n, estimator.curvature.samples or n)
    fitting = min(wanted, max(MORE, int(seconds / per_sample)))
    if fitting < wanted:
        curvature = dataclasses.replace(cast(Any, estimator.curvature), samples=fitting)
        estimator = dataclasses.replace(estimator, curvature=curvature)
    return estimator, per_sample * fitting
