"""What the influence callback asks of an estimator, and how the answers are checked by retraining."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp.callbacks.budget import Plan
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
    """The scores of training samples for each query, and, where asked for, for themselves."""

    influence: Influence
    suspects: SelfInfluence | None


def answered(asked: Asked, plan: Plan, self_influence: bool) -> Answered | None:
    """Return what the planned estimator says; of a user's own only on rank zero, which works alone then."""
    candidates = range(len(asked.train)) if plan.candidates is None else plan.candidates
    if isinstance(plan.estimator, InfluenceFunction):
        fitted = plan.estimator.fit(asked.model, asked.train, asked.task, asked.progress, asked.ranks)
        top = KEPT if len(asked.query) * len(candidates) > MOST_SCORES else None
        found = fitted(asked.query, candidates, top_k=top, check=True)
        return Answered(found, fitted.self_influence(candidates) if self_influence else None)
    if asked.ranks.index:
        return None
    held = (asked.model, asked.train, asked.query)
    return Answered(plan.estimator(*held, task=asked.task, candidates=candidates, progress=asked.progress), None)


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
