"""What the influence callback asks of an estimator, and how the answers are checked by retraining."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp.callbacks.budget import Plan, afford_scores
from lightning_interp.capture import undisturbed
from lightning_interp.influence import InfluenceFunction
from lightning_interp.influence.ranks import Ranks
from lightning_interp.progress import Progress
from lightning_interp.records import Influence, SelfInfluence, SpotCheck
from lightning_interp.samples import Samples
from lightning_interp.task import Task

MOST_SCORES = 2**24
KEPT = 100


@dataclass(frozen=True)
class Asked:
    """What is asked about: a network, its training samples and a few queries."""

    model: nn.Module
    train: Samples
    query: Samples
    task: Task
    progress: Progress
    ranks: Ranks


class Answered(NamedTuple):
    """The scores of training samples for each query, where asked for those for themselves, and what was cut."""

    influence: Influence
    suspects: SelfInfluence | None
    message: str = ""


def answered(asked: Asked, plan: Plan, self_influence: bool) -> Answered | None:
    """Return what the planned estimator says; of a user's own only on rank zero, which works alone then."""
    if isinstance(plan.estimator, InfluenceFunction):
        return _fitted_and_answered(asked, plan.estimator, plan, self_influence)
    if asked.ranks.index:
        return None
    candidates = range(len(asked.train)) if plan.candidates is None else plan.candidates
    held = (asked.model, asked.train, asked.query)
    return Answered(plan.estimator(*held, task=asked.task, candidates=candidates, progress=asked.progress), None)


def _fitted_and_answered(asked: Asked, estimator: InfluenceFunction, plan: Plan, self_influence: bool) -> Answered:
    fitted = estimator.fit(asked.model, asked.train, asked.task, asked.progress, asked.ranks)
    twice = self_influence and fitted.cheap
    places, message = asked.ranks.gather(afford_scores(fitted, asked.query, plan, twice))[0]
    candidates = range(len(asked.train)) if places is None else places
    top = KEPT if len(asked.query) * len(candidates) > MOST_SCORES else None
    found = fitted(asked.query, candidates, top_k=top, check=True)
    if self_influence and not twice:
        note = f"self-influence is left out: {estimator.curvature!r} would iterate once for each training sample"
        found = dataclasses.replace(found, notes=(*found.notes, note))
    return Answered(found, fitted.self_influence(candidates) if twice else None, message)


def spot_checks(asked: Asked, found: Influence, retrain: Callable[[Sequence[int]], nn.Module]) -> tuple[SpotCheck, ...]:
    """Retrain without the most helpful and the most harmful sample of each query, and compare.

    A baseline is retrained on all samples, by the same function: what differs is then the sample alone.
    """
    ids = asked.train.ids
    before = _losses(asked, retrain(ids))
    pairs = [
        (query, int(column))
        for query, scores in enumerate(found.scores)
        for column in dict.fromkeys((int(scores.argmax()), int(scores.argmin())))
    ]
    after = {
        column: _losses(asked, retrain([index for index in ids if index != int(found.train_ids[column])]))
        for column in dict.fromkeys(column for _, column in pairs)
    }
    centred = found.centred()
    return tuple(
        SpotCheck(
            asked.query.ids[query],
            int(found.train_ids[column]),
            float(centred[query, column]),
            float(after[column][query] - before[query]),
        )
        for query, column in pairs
    )


def _losses(asked: Asked, model: nn.Module) -> Tensor:
    """Return the queries' losses by another network of the same kind."""
    device = next(asked.model.parameters()).device
    model = model.to(device)
    with undisturbed(model), torch.no_grad():
        return torch.cat([asked.task.losses(model, batch)[2].cpu() for batch in asked.query])
