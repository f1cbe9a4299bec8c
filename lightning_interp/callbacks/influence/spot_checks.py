"""Scores checked by retraining: without the strongest samples, by the user's function or of the last layer alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Literal, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_interp.callbacks.influence.scoring import InfluenceQuestion
from lightning_interp.checks import ArgumentError
from lightning_interp.data.task import Task
from lightning_interp.influence import Damping, LastLayer, Trajectory, leave_one_out
from lightning_interp.influence.last_linear import last_linear
from lightning_interp.influence.results import Influence, SpotCheck
from lightning_interp.network.undisturbed import undisturbed
from lightning_interp.progress import Within

Trained = TypeVar("Trained")
RetrainMethod = Callable[[Sequence[int]], nn.Module] | Literal["last_layer"]
LAST_LAYER: Final = "last_layer"


def check_retrain(owner: str, retrain: Any) -> None:
    """Raise an error unless it is "last_layer", a function, or None."""
    if retrain not in (None, LAST_LAYER) and not callable(retrain):
        raise TypeError(
            f'{owner}(retrain=...): expected "{LAST_LAYER}" or a function from dataset indices to a network,'
            f" got {retrain!r}"
        )


def check_last_layer(owner: str, model: nn.Module, task: Task, batch: Any) -> None:
    """Raise an error unless a network's last layer can be retrained alone."""
    try:
        last_linear(model, task, batch)
    except ValueError as error:
        raise ArgumentError(f'{owner}(retrain="{LAST_LAYER}"): {error}') from error


def checked_by_retraining(
    question: InfluenceQuestion,
    influence: Influence,
    retrain: RetrainMethod,
    damping: float | Damping | Trajectory | None,
    seconds: float,
) -> tuple[SpotCheck, ...]:
    """Check the strongest scores of each query.

    Args:
        question: which samples were scored for which queries.
        influence: the scores.
        retrain: dataset indices → a network trained on them; or "last_layer".
        damping: how far training could move that layer.
        seconds: after which no other retraining is begun.
    """
    if not isinstance(retrain, str):
        retrain_at = partial(_retrain_at, retrain, question.train.ids)
        return spot_checks(question, influence, retrain_at, partial(_losses_of_queries, question), seconds)
    last_layer = LastLayer.of(question.model, question.train, question.query, question.task, damping, question.progress)
    checks = spot_checks(question, influence, last_layer.retrain, last_layer.losses, seconds)
    return tuple(check._replace(whole=False) for check in checks)


def spot_checks(
    question: InfluenceQuestion,
    influence: Influence,
    retrain: Callable[[Sequence[int]], Trained],
    losses: Callable[[Trained], Tensor],
    seconds: float = math.inf,
) -> tuple[SpotCheck, ...]:
    """Retrain without the most helpful and the most harmful sample of each query, and compare.

    Args:
        question: which samples were scored for which queries.
        influence: the scores.
        retrain: positions among the training samples → what was trained on them; called for all of them first, so that
            only the sample differs.
        losses: what was trained → each query's loss.
        seconds: after which no other retraining is begun; what does not fit is left out, with a warning.
    """
    pairs = [
        (query, int(column))
        for query, scores in enumerate(influence.scores)
        for column in dict.fromkeys((int(scores.argmax()), int(scores.argmin())))
    ]
    left_out = list(dict.fromkeys(column for _, column in pairs))
    positions = influence.columns[left_out].tolist()
    within = Within(seconds, question.progress)
    changes = leave_one_out(retrain, losses, len(question.train), positions, within)
    done = left_out[: changes.shape[1]]
    if len(done) < len(left_out):
        rank_zero_warn(f"DataInfluence: {len(done)} of {len(left_out)} retrainings fit into {seconds:.0f} s.")
    centred = influence.centred()
    return tuple(
        SpotCheck(
            question.query.ids[query],
            int(influence.train_ids[column]),
            float(centred[query, column]),
            float(changes[query, done.index(column)]),
        )
        for query, column in pairs
        if column in done
    )


def _retrain_at(
    retrain: Callable[[Sequence[int]], nn.Module], ids: Sequence[int], positions: Sequence[int]
) -> nn.Module:
    return retrain([ids[position] for position in positions])


def _losses_of_queries(question: InfluenceQuestion, model: nn.Module) -> Tensor:
    """Return the queries' losses by another network of the same kind."""
    device = next(question.model.parameters()).device
    model = model.to(device)
    with undisturbed(model), torch.no_grad():
        return torch.cat([question.task.losses(model, batch)[2].cpu() for batch in question.query])
