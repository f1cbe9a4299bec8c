"""Scores of an estimator within a budget: as much of the curvature and as many training samples as fit into it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import nn

from lightning_interp.callbacks.influence.budget import Stopwatch, afford_curvature, afford_scores
from lightning_interp.data.samples import Samples
from lightning_interp.data.task import Task
from lightning_interp.influence import InfluenceFunction
from lightning_interp.influence.curvature.curvature import solves_per_query
from lightning_interp.influence.estimators.fitted import FittedInfluence
from lightning_interp.influence.estimators.prepared import PreparedInfluence
from lightning_interp.influence.gradients.distributed import Ranks
from lightning_interp.influence.gradients.reader import SINGLE_PROCESS
from lightning_interp.influence.results import Influence, SelfInfluence
from lightning_interp.progress import Progress

AnyEstimator = Callable[..., Influence]
MOST_SCORES = 2**24  # 64 MB of float32: of more, only each query's strongest are kept
STRONGEST = 100  # of each of a query's lists, more than a report shows
SELF_LEFT_OUT = "self-influence is left out: this curvature would iterate once for each training sample"


@dataclass(frozen=True)
class InfluenceQuestion:
    """A network, its training samples, and the queries whose losses they are scored for."""

    model: nn.Module
    train: Samples
    query: Samples
    task: Task
    progress: Progress
    ranks: Ranks

    def prepare(self, estimator: InfluenceFunction) -> PreparedInfluence:
        """Return the estimator ready to be fitted to this network."""
        return estimator.prepare(self.model, self.train, self.task, self.progress, self.ranks)


class InfluenceAnswer(NamedTuple):
    """The scores of training samples for each query and, on request, for themselves.

    Args:
        influence: for each query.
        suspects: for themselves.
        message: what was cut to stay within the budget; empty if nothing.
    """

    influence: Influence
    suspects: SelfInfluence | None
    message: str


def score_within_budget(
    question: InfluenceQuestion, estimator: AnyEstimator, self_influence: bool, seconds: float
) -> InfluenceAnswer | None:
    """Score in about this time; a user's own estimator works on rank zero alone, the other ranks return None."""
    if isinstance(estimator, InfluenceFunction):
        return _score_by_influence_function(question, estimator, self_influence, seconds)
    if question.ranks.index:
        return None
    network_and_samples = (question.model, question.train, question.query)

    def score(candidates: Sequence[int]) -> float:
        started = time.perf_counter()
        estimator(*network_and_samples, task=question.task, candidates=candidates)
        return time.perf_counter() - started

    fitting = afford_scores(score, question.train, seconds)
    candidates = range(len(question.train)) if fitting is None else fitting
    influence = estimator(*network_and_samples, task=question.task, candidates=candidates, progress=question.progress)
    return InfluenceAnswer(influence, None, _cut_message(fitting, question, seconds))


def _score_by_influence_function(
    question: InfluenceQuestion, estimator: InfluenceFunction, self_influence: bool, seconds: float
) -> InfluenceAnswer:
    """Fit within half of the time, and score what fits into what is left of it; rank zero decides for all."""
    started = time.perf_counter()
    prepared, message = afford_curvature(estimator, question.prepare, seconds / 2, question.ranks)
    fitted = prepared.fit()
    iterative = solves_per_query(fitted.curvature)
    left_out = (SELF_LEFT_OUT,) if self_influence and iterative else ()
    self_influence = self_influence and not iterative
    seconds_left = math.inf if iterative else seconds - (time.perf_counter() - started)
    timed = partial(_scoring_seconds, question, fitted, self_influence)
    fitting = question.ranks.gather(afford_scores(timed, question.train, question.ranks.count * seconds_left))[0]
    candidates = range(len(question.train)) if fitting is None else fitting
    top_k = STRONGEST if len(question.query) * len(candidates) > MOST_SCORES else None
    influence = fitted(question.query, candidates, top_k=top_k, check=True)
    suspects = fitted.self_influence(candidates) if self_influence else None
    influence = dataclasses.replace(influence, notes=(*influence.notes, *left_out))
    messages = filter(None, (message, _cut_message(fitting, question, seconds)))
    return InfluenceAnswer(influence, suspects, " ".join(messages))


def _scoring_seconds(
    question: InfluenceQuestion, fitted: FittedInfluence, self_influence: bool, candidates: Sequence[int]
) -> float:
    """Return the seconds of the work that grows with the samples; work that does not may take far longer."""
    watch = Stopwatch()
    reader = dataclasses.replace(fitted.reader, progress=watch, ranks=SINGLE_PROCESS)
    timed = dataclasses.replace(fitted, reader=reader)
    timed(question.query, candidates)
    if self_influence:
        timed.self_influence(candidates)
    return watch.of("scoring") + watch.of("self-influence")


def _cut_message(fitting: Sequence[int] | None, question: InfluenceQuestion, seconds: float) -> str:
    if fitting is None:
        return ""
    return f"{len(fitting):,} of {len(question.train):,} training samples, evenly spread, fit into {seconds:.0f} s."
