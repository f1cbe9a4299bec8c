"""How many training samples can be scored in the time there is."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn

from lightning_interp.influence import EKFAC, KFAC, InfluenceFunction
from lightning_interp.influence.choice import weighted_layers
from lightning_interp.influence.curvature import Curvature
from lightning_interp.influence.fitted import FittedInfluence
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
        estimator: the one asked for, on fewer layers or with a curvature from less where the time is short.
        candidates: places in the training set to score; None for all.
        message: what was cut, in words; empty if nothing.
        seconds: the budget.
        until: when it is used up, by `time.perf_counter`.
        trial: how many samples a trial takes.
    """

    estimator: Estimator
    candidates: Sequence[int] | None = None
    message: str = ""
    seconds: float = math.inf
    until: float = math.inf
    trial: int = 0


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


def afford(estimator: Estimator, model: nn.Module, train: Samples, query: Samples, task: Task, seconds: float) -> Plan:
    """Time an estimator on a few samples, and cut its work so that all of it, the trial too, takes about `seconds`.

    Args:
        estimator: an `InfluenceFunction` is cut to the last layer where decomposing the curvature alone would take
            too long, and its curvature to what fits into half of the time (`afford_scores` says the rest once it is
            fitted); of any other callable the scored samples are cut, if it reports its progress as "curvature…" and
            "scoring…".
        model: the trained model.
        train: all training samples.
        query: the queries.
        task: how to call the model.
        seconds: the budget; infinite for no limit.
    """
    if len(train) <= MOST or math.isinf(seconds):
        return Plan(estimator)
    until = time.perf_counter() + seconds
    if isinstance(estimator, InfluenceFunction):
        return _afford_curvature(estimator, model, train, query, task, seconds, until)
    cold = _seconds(lambda watch: estimator(model, train.spread(FEW), query, task=task, progress=watch))[1]
    trial = _trial(cold, seconds)
    watch, whole = _seconds(lambda watch: estimator(model, train.spread(trial), query, task=task, progress=watch))
    fitting, scoring = (watch.of(what) / trial for what in ("curvature", "scoring"))
    left = until - time.perf_counter() - (whole - trial * (fitting + scoring))
    return Plan(estimator, *_fitting(train, left - fitting * len(train), scoring, seconds))


def afford_scores(fitted: FittedInfluence, query: Samples, plan: Plan, twice: bool) -> tuple[Sequence[int] | None, str]:
    """Time a fitted influence function on a few training samples: return the places of those that fit, and say so.

    Args:
        fitted: on all training samples; where several ranks share the work, all call this.
        query: the queries.
        plan: by which it was fitted.
        twice: whether the training samples are passed over a second time, for their influence on themselves.
    """
    if math.isinf(plan.until) or not fitted.cheap:
        return None, ""
    few = fitted.train.places(plan.trial)

    def score(watch: Stopwatch) -> None:
        timed = dataclasses.replace(fitted, reader=dataclasses.replace(fitted.reader, progress=watch))
        timed(query, few, check=True)
        if twice:
            timed.self_influence(few)

    watch, whole = _seconds(score)
    spent = watch.of("scoring") + watch.of("self-influence")
    left = plan.until - time.perf_counter() - (whole - spent)
    return _fitting(fitted.train, left, spent / len(few), plan.seconds)


def _afford_curvature(
    estimator: InfluenceFunction,
    model: nn.Module,
    train: Samples,
    query: Samples,
    task: Task,
    seconds: float,
    until: float,
) -> Plan:
    """Cut an influence function's curvature to half of the time, timed in miniature: fewer samples, fewer columns."""
    said = ""
    curvature = estimator.chosen(model, train, task)[0]
    if estimator.layers is None and _decomposition(curvature, model) > TRIAL_SHARE * seconds:
        last = weighted_layers(model)[-1]
        estimator = dataclasses.replace(estimator, layers=[last])
        curvature = estimator.chosen(model, train, task)[0]
        said = f"only the parameters of {last} enter: the curvature of all layers would take too long."

    def fit(count: int, watch: Stopwatch) -> None:
        small = dataclasses.replace(estimator, curvature=_share_of(curvature, count / len(train)))
        fitted = small.fit(model, train.spread(count), task, watch)
        if not fitted.cheap:
            fitted(query)

    trial = _trial(_seconds(partial(fit, FEW))[1], seconds)
    watch, _ = _seconds(partial(fit, trial))
    share = (until - time.perf_counter()) / 2 / max(1e-9, watch.of("curvature") / trial * len(train))
    if share < 1:
        estimator = dataclasses.replace(estimator, curvature=_share_of(curvature, share, len(train)))
    return Plan(estimator, None, said, seconds, until, trial)


def _share_of(curvature: Curvature, share: float, n: int | None = None) -> Curvature:
    """Return a curvature from a share of its columns, and of all n samples, as far as it has such numbers."""
    held: Any = curvature
    less: dict[str, int] = {}
    if getattr(held, "columns", None):
        less["columns"] = min(held.columns, max(FEW if n is None else MOST, math.ceil(share * held.columns)))
    if n is not None and hasattr(held, "samples"):
        less["samples"] = max(MOST, int(share * (held.samples or n)))
    return cast(Curvature, dataclasses.replace(held, **less))


def _fitting(train: Samples, left: float, each: float, seconds: float) -> tuple[Sequence[int] | None, str]:
    """Return the places of as many samples as fit into the seconds that are left, and say so; None for all."""
    count = min(len(train), max(MOST, int(left / max(1e-9, each))))
    if count == len(train):
        return None, ""
    return train.places(
        count
    ), f"{count:,} of {len(train):,} training samples, evenly spread, fit into {seconds:.0f} s."


def _trial(cold: float, seconds: float) -> int:
    """Return how many samples a trial may take, by the seconds that few of them took."""
    return int(min(MOST, max(FEW, TRIAL_SHARE * seconds / (cold / FEW))))


def _seconds(work: Callable[[Stopwatch], Any]) -> tuple[Stopwatch, float]:
    watch, started = Stopwatch(), time.perf_counter()
    work(watch)
    return watch, time.perf_counter() - started


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
