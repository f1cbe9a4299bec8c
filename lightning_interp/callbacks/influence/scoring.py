"""What the influence callback asks of an estimator, and what it answers within a budget."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lightning_interp.callbacks.influence.budget import Estimator, Stopwatch, afford_curvature, afford_scores
from lightning_interp.data.samples import Samples
from lightning_interp.data.task import Task
from lightning_interp.influence import ConjugateGradient, InfluenceFunction, LiSSA
from lightning_interp.influence.gradients.distributed import Ranks, SingleProcess
from lightning_interp.influence.results import Influence, SelfInfluence
from lightning_interp.progress import Progress

MOST_SCORES = 2**24
KEPT = 100
SELF_LEFT_OUT = "self-influence is left out: this curvature would iterate once for each training sample"


@dataclass(frozen=True)
class InfluenceQuestion:
    """What is asked about: a network, its training samples and a few queries."""

    model: nn.Module
    train: Samples
    query: Samples
    task: Task
    progress: Progress
    ranks: Ranks


class InfluenceAnswer(NamedTuple):
    """The scores of training samples for each query, and, where asked for, for themselves.

    Args:
        influence: for each query.
        suspects: for themselves.
        message: what was cut to stay within the budget; empty if nothing.
    """

    influence: Influence
    suspects: SelfInfluence | None
    message: str


def score_within_budget(
    asked: InfluenceQuestion, estimator: Estimator, self_influence: bool, seconds: float
) -> InfluenceAnswer | None:
    """Return what the estimator says in about this time; of a user's own only on rank zero, which works alone then."""
    if isinstance(estimator, InfluenceFunction):
        return _by_influence_function(asked, estimator, self_influence, seconds)
    if asked.ranks.index:
        return None

    def score(candidates: Sequence[int]) -> float:
        started = time.perf_counter()
        estimator(asked.model, asked.train, asked.query, task=asked.task, candidates=candidates)
        return time.perf_counter() - started

    candidates = afford_scores(score, asked.train, seconds)
    chosen = range(len(asked.train)) if candidates is None else candidates
    held = (asked.model, asked.train, asked.query)
    found = estimator(*held, task=asked.task, candidates=chosen, progress=asked.progress)
    return InfluenceAnswer(found, None, _cut(candidates, asked, seconds))


def _by_influence_function(
    asked: InfluenceQuestion, estimator: InfluenceFunction, self_influence: bool, seconds: float
) -> InfluenceAnswer:
    """Fit within half of the time, and score what fits into the rest; rank zero decides for all."""
    started = time.perf_counter()
    plan = asked.ranks.gather(afford_curvature(estimator, asked.model, asked.train, asked.task, seconds / 2))[0]
    fitted = plan.estimator.fit(asked.model, asked.train, asked.task, asked.progress, asked.ranks)
    iterative = isinstance(fitted.curvature, ConjugateGradient | LiSSA)  # all of its cost is in the queries
    left_out = (SELF_LEFT_OUT,) if self_influence and iterative else ()
    self_influence = self_influence and not iterative

    def score(candidates: Sequence[int]) -> float:
        """Return the seconds of what grows with the samples: the rest, seconds too, would drown it."""
        watch = Stopwatch()
        alone = dataclasses.replace(
            fitted, reader=dataclasses.replace(fitted.reader, progress=watch, ranks=SingleProcess())
        )
        alone(asked.query, candidates)
        if self_influence:
            alone.self_influence(candidates)
        return watch.of("scoring") + watch.of("self-influence")

    left = math.inf if iterative else seconds - (time.perf_counter() - started)
    candidates = asked.ranks.gather(afford_scores(score, asked.train, asked.ranks.count * left))[0]
    chosen = range(len(asked.train)) if candidates is None else candidates
    top = KEPT if len(asked.query) * len(chosen) > MOST_SCORES else None
    found = fitted(asked.query, chosen, top_k=top, check=True)
    suspects = fitted.self_influence(chosen) if self_influence else None
    found = dataclasses.replace(found, notes=(*found.notes, *filter(None, [plan.why]), *left_out))
    return InfluenceAnswer(found, suspects, " ".join(filter(None, (plan.message, _cut(candidates, asked, seconds)))))


def _cut(candidates: Sequence[int] | None, asked: InfluenceQuestion, seconds: float) -> str:
    if candidates is None:
        return ""
    return f"{len(candidates):,} of {len(asked.train):,} training samples, evenly spread, fit into {seconds:.0f} s."
