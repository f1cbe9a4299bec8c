"""Which validation samples influence explains: the most confidently wrong, or those that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_interp.callbacks.trainer_data import given_samples, mover, progress_of, validation_source, with_ids
from lightning_interp.data.batch import count_samples, single_sample
from lightning_interp.data.probe import take_probe
from lightning_interp.data.samples import Samples
from lightning_interp.data.task import Task, predict_classes

MOST_SEARCHED = 4096  # one forward each; more would cost as much as scoring a small training set
MOST_OF_A_STREAM = 256  # samples of an iterable dataset are kept in memory


def query_candidates(
    trainer: pl.Trainer, dataset: Any, task: Task, owner: str, ids: Sequence[int] | None = None
) -> Samples:
    """Return the samples among which queries are chosen; of a stream, the first 256.

    Args:
        trainer: whose validation set is taken when there is no `dataset`.
        dataset: the user's own; None for the validation set.
        task: how to read a batch.
        owner: name of the callback, for its messages.
        ids: dataset indices of the samples to take; all when None.

    Raises:
        ArgumentError: an index is not one of the data set's.
    """
    candidates = _candidates(trainer, dataset, task, owner)
    return candidates if ids is None else with_ids(candidates, ids)


def _candidates(trainer: pl.Trainer, dataset: Any, task: Task, owner: str) -> Samples:
    if dataset is not None:
        return given_samples(trainer, dataset)
    samples = validation_source(trainer, owner).samples
    if isinstance(samples, Samples):
        return samples
    batches = take_probe(samples, MOST_OF_A_STREAM, "validation set", task).batches
    rows = [single_sample(batch, index) for batch in batches for index in range(count_samples(batch))]
    return Samples(rows, batch_size=count_samples(batches[0]), move=mover(trainer))


def choose_queries(trainer: pl.Trainer, module: nn.Module, task: Task, candidates: Samples, count: int) -> Samples:
    """Return the samples that are most confidently wrong, then those of the highest loss."""
    samples = candidates.spread(MOST_SEARCHED)
    batches = -(-len(samples) // samples.batch_size)
    with torch.no_grad():
        strangeness_of_batches = [
            strangeness(task, *task.losses(module, batch)).cpu()
            for batch in progress_of(trainer)(samples, batches, "choosing queries")
        ]
    order = torch.cat(strangeness_of_batches).argsort(descending=True, stable=True)
    return samples.at(order[:count].tolist())


def strangeness(task: Task, outputs: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
    """Return what to sort queries by, `(n,)`: wrong answers by their probability, then the others by loss."""
    kind = task.problem(outputs, targets)
    if kind not in ("classes", "binary") or targets.numel() != len(outputs):
        return losses.detach()
    predicted_class, probability = predict_classes(outputs, kind)
    wrong = predicted_class != targets.reshape(-1).to(predicted_class)
    return torch.where(wrong, 1 + probability, -torch.expm1(-losses.detach()).to(probability))
