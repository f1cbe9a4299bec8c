"""TRAK: attribution by a linear model in the randomly projected gradients of the network's margin."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_interp.data.samples import Samples, train_and_query_samples
from lightning_interp.data.task import Problem, Task
from lightning_interp.influence.curvature import IdentityCurvature
from lightning_interp.influence.curvature.curvature import sum_of
from lightning_interp.influence.curvature.projected import damped_factor, second_moment
from lightning_interp.influence.estimators.fitted import check_finite
from lightning_interp.influence.estimators.influence_function import InfluenceFunction
from lightning_interp.influence.gradients.projection import Projection
from lightning_interp.influence.gradients.reader import Reader
from lightning_interp.influence.results import Influence
from lightning_interp.influence.scores.over_checkpoints import (
    ScoredBatch,
    collect_scores,
    sample_chunks,
    samples_to_score,
    summed_over_checkpoints,
    using_checkpoint,
    without_unit,
)
from lightning_interp.network.weights import Checkpoint, check_checkpoints
from lightning_interp.progress import Progress, quiet


@dataclass(frozen=True)
class TRAK:
    """Attribution by regression on the projected gradients of each sample's margin, averaged over networks.

    scores[q, i] = [(1/M) Σ_m φ_qᵀ (ΦᵀΦ)⁻¹ φ_i] · [(1/M) Σ_m (1 − p_i)], φ the projected gradient of the margin
    f = log(p / (1 − p)), p the probability of the sample's own label, Φ those of all training samples; without a unit.
    Positive is helpful. Each network gets a projection of its own. One network alone follows retraining poorly; more
    of them, or damping, help.

    Reference: Park et al., TRAK: Attributing Model Behavior at Scale, 2023.

    Args:
        models: weights of several networks (see `lightning_interp.network.weights.loaded`), the model's own not
            among them; the model's own alone when None.
        dim: numbers per gradient, even; without damping no more than there are training samples.
        damping: added to the diagonal of ΦᵀΦ / n.
        layers: names or glob patterns of the layers whose parameters enter; all that are covered when None.
        seed: of the projections.
    """

    models: Sequence[Checkpoint] | None = dataclasses.field(default=None, repr=False)
    dim: int = 512
    damping: float = 0.0
    layers: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        Projection(self.dim)
        if self.models is not None:
            check_checkpoints("TRAK(models=...)", self.models)
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"TRAK(damping=...): expected 0 or a positive number, got {self.damping}")

    def __call__(
        self,
        model: nn.Module,
        train: Any,
        query: Any,
        task: Task = Task(),
        candidates: Sequence[int] | None = None,
        top_k: int | None = None,
        progress: Progress = quiet,
    ) -> Influence:
        """Score training samples for each query; the model's weights are as they were afterwards.

        Args:
            model: any classifier; it runs in eval mode.
            train: training dataset (or a loader, read in dataset order).
            query: dataset or loader of the samples to explain.
            task: how to read batches and call the model.
            candidates: indices in `train` to score; all when None. ΦᵀΦ is of all in any case.
            top_k: return only so many of each query's most helpful, harmful and surprisingly helpful samples: memory
                then does not grow with `train`, and each network's weights are read once for about 4,096 samples.
            progress: shows how far it got.

        Raises:
            ValueError: a dataset is empty, no parameter is covered, the model is no classifier, there are fewer samples
                than `dim`, or a checkpoint does not fit the model.
            FloatingPointError: gradients or scores are not finite, or ΦᵀΦ cannot be inverted.
        """
        samples, queries = train_and_query_samples(train, query)
        if not self.damping and len(samples) < self.dim:
            raise ValueError(
                f"TRAK(dim=...): expected at most {len(samples)} (the training samples) without damping, got {self.dim}"
            )
        scored = samples_to_score(samples, candidates)
        chunks = sample_chunks(scored, top_k)
        weights: Sequence[Checkpoint | None] = [None] if self.models is None else self.models
        networks = [self._fit(model, weights[k], k, (samples, queries), task, progress) for k in range(len(weights))]

        def score(index: int, chunk: Samples) -> Iterator[ScoredBatch]:
            return networks[index].scores(chunk)

        targets, count = networks[0].targets, len(networks)
        sums = summed_over_checkpoints(model, weights, chunks, score)
        columns = (_average(*chunk, count) for chunk in sums)
        return without_unit(
            collect_scores(columns, targets, len(scored), top_k),
            scored,
            samples,
            networks[0].reader.coverage,
            query_targets=targets,
            query_losses=sum_of(network.losses for network in networks) / count,
            method=f"{self!r}, {count} network{'s' * (count > 1)}",
            damping=self.damping or nan,
            curvature_n=len(samples),
        )

    def _fit(
        self,
        model: nn.Module,
        weights: Checkpoint | None,
        index: int,
        data: tuple[Samples, Samples],
        task: Task,
        progress: Progress,
    ) -> _Network:
        """Return one network's (ΦᵀΦ)⁻¹ φ of the queries, from one pass over the training samples."""
        train, query = data
        projection = Projection(self.dim, self.seed + index)
        with using_checkpoint(model, weights):
            reader = (
                InfluenceFunction(IdentityCurvature(), 1.0, self.layers).prepare(model, train, task, progress).reader
            )
            queries = list(_margins(reader, query, projection, "queries"))
            margins = _margins(reader, train, projection, "training gradients")
            moment = second_moment(batch.projected for batch in margins)
            factor = damped_factor(moment / len(train), self.damping)
        phi = torch.cat([batch.projected for batch in queries])
        return _Network(
            reader,
            projection,
            torch.cholesky_solve(phi.T.cpu().double(), factor).T.to(phi) / len(train),
            torch.cat([batch.targets for batch in queries]),
            torch.cat([batch.losses for batch in queries]),
        )


class _Network(NamedTuple):
    """One network: how it is read, its projection, and of the queries (ΦᵀΦ)⁻¹ φ, targets and losses."""

    reader: Reader
    projection: Projection
    solved: Tensor
    targets: Tensor
    losses: Tensor

    def scores(self, samples: Samples) -> Iterator[ScoredBatch]:
        """Yield φ_qᵀ (ΦᵀΦ)⁻¹ φ_i, with 1 − p_i as one more row, and targets; the network has these weights."""
        for batch in _margins(self.reader, samples, self.projection, "scoring training samples"):
            scores = check_finite(self.solved @ batch.projected.T, "scores").cpu()
            yield torch.cat([scores, batch.error_probabilities[None].to(scores)]), batch.targets


def _average(sums: Tensor, targets: Tensor, count: int) -> ScoredBatch:
    """Return the mean scores times the mean 1 − p, from the rows of the sums."""
    # Both factors are means over the networks, so that their sums are divided by the count twice.
    return sums[:-1] * (sums[-1] / count**2), targets


class _Margins(NamedTuple):
    """Of some samples: projected gradients of their margins, 1 − p, targets, losses."""

    projected: Tensor
    error_probabilities: Tensor
    targets: Tensor
    losses: Tensor


def _margins(reader: Reader, samples: Samples, projection: Projection, what: str) -> Iterator[_Margins]:
    task = reader.coverage.task
    for batch in reader.per_sample_gradients(samples, what):
        # The margin's slope in the outputs weights their gradients: the chain rule, by one backward.
        outputs = batch.outputs.detach().requires_grad_()
        values = margin(outputs, batch.targets, task.problem(outputs, batch.targets))
        (weights,) = torch.autograd.grad(values.sum(), outputs)
        projected = check_finite(projection(batch.output_gradients(weights)), "gradients of the margins")
        of_samples = (torch.sigmoid(-values), batch.targets, batch.losses)
        yield _Margins(projected, *(values.detach().cpu() for values in of_samples))


def margin(outputs: Tensor, targets: Tensor, kind: Problem | None) -> Float[Tensor, " n"]:
    """Return log(p / (1 − p)) of each sample's own label.

    Of classes the label's logit less the log-sum-exp of the others'; of one logit that logit, with its sign turned for
    label 0.

    Raises:
        ValueError: samples have no single label.
    """
    if kind == "binary":
        return outputs.reshape(len(outputs)) * (2 * targets.reshape(len(outputs)).to(outputs) - 1)
    if kind != "classes" or outputs.ndim != 2:
        raise ValueError(
            "TRAK: expected a classifier with one label per sample, got"
            f" {kind or 'no known problem'} with outputs {tuple(outputs.shape)}"
        )
    own = F.one_hot(targets.reshape(-1).long(), outputs.shape[1]).bool()
    return outputs[own] - outputs.masked_fill(own, -torch.inf).logsumexp(1)
