"""A fitted influence function: scores of training samples for queries, and for themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_interp.data.batch import count_samples, slice_samples
from lightning_interp.data.samples import Samples
from lightning_interp.data.task import Task, probabilities
from lightning_interp.influence.curvature import Curvature, Fitted, Inverse
from lightning_interp.influence.curvature.curvature import Gradients, Scorer, in_loss_unit
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.gradients.coverage import Coverage
from lightning_interp.influence.gradients.distributed import share_of_rank
from lightning_interp.influence.gradients.factored import FactoredGradients, concatenate_samples
from lightning_interp.influence.gradients.per_sample import PerSampleGradients
from lightning_interp.influence.gradients.reader import Reader
from lightning_interp.influence.results import Influence, SelfInfluence
from lightning_interp.influence.scores.duplicates import Duplicates
from lightning_interp.influence.scores.leverage import leverage_scores
from lightning_interp.influence.scores.top_k import (
    AllScores,
    ScoreColumns,
    ScoreKeeper,
    TopScores,
    merge_columns,
    overlap,
)
from lightning_interp.network.undisturbed import differentiable

COMPARED_STRONGEST = 10  # of each query: about what a report shows
DAMPING_FACTOR = 3.0  # by which damping is varied: about half an order of magnitude


@dataclass(frozen=True, eq=False)
class FittedInfluence:
    """Curvature estimated and inverted, ready for any number of queries.

    Args:
        reader: how samples go through the network.
        train: the training samples.
        curvature: the user's, or the default.
        fitted: the curvature estimated.
        inverse: damped and inverted.
        damping: that was added.
        notes: on the curvature, for the report.
        leverage: whether a sample that is left out takes its own curvature with it.
    """

    reader: Reader
    train: Samples
    curvature: Curvature
    fitted: Fitted
    inverse: Inverse
    damping: Damping
    notes: tuple[str, ...]
    leverage: bool = False

    @property
    def coverage(self) -> Coverage:
        """Which parameters of the network are covered, and how."""
        return self.reader.coverage

    def __call__(
        self,
        query: Any,
        candidates: Sequence[int] | None = None,
        top_k: int | None = None,
        scores_file: str | Path | None = None,
        check: bool = False,
    ) -> Influence:
        """Score training samples for each query.

        Args:
            query: dataset or loader of the samples whose losses are explained.
            candidates: indices of the training samples to score; all when None.
            top_k: keep only so many of each query's most helpful, harmful and surprisingly helpful samples: memory then
                does not grow with the training set.
            scores_file: keep all scores in this `.npy` file, mapped into memory.
            check: score a second time by `3 ×` the damping, and by each half of a projection where there is one, and
                report how far the strongest 10 of each query agree; find the queries among the samples.

        Raises:
            ValueError: there are no queries, `top_k` and `scores_file` are both given, or the curvature's inverse gives
                scores of another shape.
            FloatingPointError: gradients or scores are not finite.
        """
        query, scored = Samples.of(query), self.train if candidates is None else self.train.at(candidates)
        self._check_call(query, scored, top_k, scores_file)
        ranks = self.reader.ranks
        own_samples, positions = share_of_rank(scored, ranks)
        path = None if scores_file is None else Path(scores_file)
        with differentiable(self.coverage.model):
            queries = query_gradients(self.reader, self.reader.rebatch(query))
            keeper = (
                AllScores(len(query), len(own_samples), path) if top_k is None else TopScores(top_k, queries.targets)
            )
            rankings = [_Ranking(self.inverse.against(queries.gradients), keeper)]
            alternatives = self._alternatives() if check else {}
            for inverse in alternatives.values():
                strongest = TopScores(COMPARED_STRONGEST, queries.targets)
                rankings.append(_Ranking(inverse.against(queries.gradients), strongest))
            duplicates = Duplicates(queries.inputs) if check else None
            sums = self._score(own_samples, rankings, duplicates, len(query))
        own_columns = [keeper.columns().at(positions) for _, keeper in rankings] if len(own_samples) else []
        own_pairs = [] if duplicates is None else [(row, positions[index]) for row, index in duplicates.pairs]
        columns_of_ranks, sums_of_ranks, pairs_of_ranks = zip(
            *ranks.gather((own_columns, sums, own_pairs)), strict=True
        )
        columns = [merge_columns(subsets) for subsets in zip(*filter(None, columns_of_ranks), strict=True)]
        totals = _Totals.of(sums_of_ranks, scored, pairs_of_ranks)
        pairs = zip(alternatives, columns[1:], strict=True)
        agreement = {name: overlap(columns[0], alternative, COMPARED_STRONGEST) for name, alternative in pairs}
        notes = tuple(getattr(rankings[0].scorer, "notes", ()))
        return self._record(scored, queries, columns[0], totals, agreement, notes)

    def _check_call(self, query: Samples, scored: Samples, top_k: int | None, scores_file: str | Path | None) -> None:
        if not len(query):
            raise ValueError("query: expected samples, got none")
        if top_k is not None and (top_k < 1 or scores_file is not None):
            raise ValueError(f"top_k: expected a number from 1, without scores_file, got {top_k} and {scores_file}")
        if scores_file is not None and self.reader.ranks.count > 1:
            raise ValueError("scores_file: expected one process, got several; pass top_k")
        if not len(scored):
            raise ValueError("candidates: expected training samples to score, got none")

    def self_influence(self, candidates: Sequence[int] | None = None) -> SelfInfluence:
        """Return ∇ℓ_iᵀ (H + Λ)⁻¹ ∇ℓ_i / n of training samples: by how much a sample's own loss would rise without it.

        Args:
            candidates: indices of training samples; all when None.
        """
        samples = self.train if candidates is None else self.train.at(candidates)
        own_samples, positions = share_of_rank(samples, self.reader.ranks)
        with differentiable(self.coverage.model):
            batches = self.reader.per_sample_gradients(own_samples, "self-influence")
            own_rows = [self._self_influence_of_batch(batch) for batch in batches]
        ranks = self.reader.ranks.gather((own_rows, list(positions)))
        order = torch.tensor([position for _, positions_of_rank in ranks for position in positions_of_rank]).argsort()
        columns = [torch.cat(column)[order] for column in zip(*(row for rows, _ in ranks for row in rows), strict=True)]
        scores, losses, targets, predicted, label_probability = columns
        return SelfInfluence(
            check_finite(scores, "self-influence"),
            torch.tensor(samples.ids),
            targets,
            losses,
            predicted if bool((predicted >= 0).all()) else None,
            label_probability,
        )

    def _self_influence_of_batch(self, batch: PerSampleGradients) -> tuple[Tensor, ...]:
        """Return self-influence, loss, target, predicted class (−1 for none) and the label's probability."""
        task = self.coverage.task
        squares = self.inverse.squares(batch.loss_gradients())
        self._check_shape(squares, (len(batch),))
        scores = squares.cpu() / len(self.train)
        kind = task.problem(batch.outputs, batch.targets)
        predicted, label_probability = torch.full((len(batch),), -1), torch.full((len(batch),), torch.nan)
        if kind in ("classes", "binary") and batch.targets.numel() == len(batch):
            class_probabilities = probabilities(batch.outputs, kind).cpu()
            predicted = class_probabilities.argmax(1)
            label_probability = class_probabilities.gather(1, batch.targets.reshape(-1, 1).long().cpu())[:, 0]
        return scores, batch.losses.detach().cpu(), batch.targets.detach().cpu(), predicted, label_probability

    def _alternatives(self) -> dict[str, Inverse]:
        """Return other inverses, which should not change the ranking much."""
        shift = {block: DAMPING_FACTOR * value for block, value in self.damping.shift(self.coverage).items()}
        halves = zip(("one half", "the other half"), getattr(self.inverse, "halves", ()), strict=False)
        return {
            f"{DAMPING_FACTOR:g} × the damping": self.fitted.inverse(shift),
            **{f"{which} of the projection": half for which, half in halves},
        }

    def _score(
        self, samples: Samples, rankings: Sequence[_Ranking], duplicates: Duplicates | None, query_count: int
    ) -> _Sums:
        """Add the samples to each ranking, and return the sums over them for the first one."""
        score_sums: Tensor | float = 0.0
        gradient_sums: dict[str, Tensor] = {}
        task = self.coverage.task
        for batch in self.reader.per_sample_gradients(samples, "scoring training samples"):
            # With leverage, the batch's graph is needed for its own columns of the curvature.
            rows = batch.loss_gradients(keep_graph=self.leverage)
            targets = batch.targets.detach().cpu()
            for index, (scorer, keeper) in enumerate(rankings):
                leveraged = self.leverage and index == 0
                scores = self._leverage_scores(batch, rows, scorer) if leveraged else scorer(rows)
                self._check_shape(scores, (query_count, len(batch)))
                scores = check_finite(scores, "scores").cpu() / len(self.train)
                keeper.add(scores, targets)
                if index == 0:
                    score_sums = score_sums + scores.sum(1)
            for block, row in rows.items():
                accumulate(gradient_sums, block, row.sum())
            if duplicates is not None:
                for explained in _explained_inputs(task, batch.batch):
                    duplicates.add(explained)
        return _Sums(score_sums, {block: total.cpu() for block, total in gradient_sums.items()})

    def _check_shape(self, scores: Tensor, shape: tuple[int, ...]) -> None:
        if scores.shape != shape:
            raise ValueError(
                f"{type(self.curvature).__name__}: expected its inverse to give scores of shape {shape}, got"
                f" {tuple(scores.shape)}"
            )

    def _leverage_scores(self, batch: PerSampleGradients, rows: Gradients, scorer: Scorer) -> Tensor:
        return leverage_scores(batch, rows, scorer, self.inverse, self.coverage.task, len(self.train))

    def _record(
        self,
        scored: Samples,
        queries: _QueryGradients,
        columns: ScoreColumns,
        totals: _Totals,
        agreement: dict[str, float],
        notes: tuple[str, ...],
    ) -> Influence:
        return Influence(
            scores=columns.scores,
            train_ids=torch.tensor(_ids(scored, columns.positions)),
            train_targets=columns.targets,
            query_targets=queries.targets,
            query_losses=queries.losses,
            method=f"influence function, {self.curvature!r}",
            damping=self.damping.typical if in_loss_unit(self.curvature) else torch.nan,
            covered=tuple(self.coverage.parameter_sizes),
            left_out=self.coverage.left_out,
            covered_elements=self.coverage.size,
            gradient_norm=totals.gradient_norm,
            curvature_n=self.fitted.n,
            notes=(*self._notes(columns.scores, len(scored), queries), *notes),
            unit="loss" if in_loss_unit(self.curvature) else "none",
            places=columns.positions,
            scored=len(scored),
            mean=totals.mean,
            agreement=agreement,
            duplicates=totals.duplicates,
        )

    def _notes(self, scores: Tensor, scored: int, queries: _QueryGradients) -> tuple[str, ...]:
        notes = []
        impossible = int((scores < -queries.losses[:, None]).sum())
        if impossible and in_loss_unit(self.curvature):
            notes.append(f"{impossible} scores predict a loss below zero: read their order, not their size")
        if self.damping.origin != "given" and in_loss_unit(self.curvature):
            notes.append(f"damping: {self.damping.origin}")
        if scored < len(self.train):
            notes.append(
                f"{scored:,} of {len(self.train):,} training samples were scored; the others are not in the ranking"
            )
        return (*notes, *self.notes)


def _ids(samples: Samples, positions: Tensor) -> list[int]:
    """Return the dataset indices of the samples at these ascending positions."""
    return samples.ids if len(positions) == len(samples) else samples.at(positions.tolist()).ids


class _Ranking(NamedTuple):
    """One way to score, and where its scores go."""

    scorer: Scorer
    keeper: ScoreKeeper


class _QueryGradients(NamedTuple):
    gradients: Gradients
    targets: Tensor
    losses: Tensor
    inputs: list[Tensor]


class _Sums(NamedTuple):
    """Sums over training samples: of each query's scores, and of the gradients."""

    scores: Tensor | float
    gradients: dict[str, Tensor]


class _Totals(NamedTuple):
    """The sums of all ranks together: each query's mean score, the mean gradient's norm, and duplicates."""

    mean: Tensor
    gradient_norm: float
    duplicates: dict[int, tuple[int, ...]]

    @classmethod
    def of(
        cls, sums_of_ranks: Sequence[_Sums], samples: Samples, pairs_of_ranks: Sequence[Sequence[tuple[int, int]]]
    ) -> _Totals:
        """Add up what the ranks found.

        Args:
            sums_of_ranks: over each rank's samples.
            samples: of all ranks.
            pairs_of_ranks: queries and the positions of samples that equal them.
        """
        gradients: dict[str, Tensor] = {}
        for sums in sums_of_ranks:
            for block, total in sums.gradients.items():
                accumulate(gradients, block, total)
        norm = sum(float((total / len(samples)).double().square().sum()) for total in gradients.values()) ** 0.5
        duplicates: dict[int, tuple[int, ...]] = {}
        for query, position in sorted(pair for pairs in pairs_of_ranks for pair in pairs):
            duplicates[query] = (*duplicates.get(query, ()), *samples.at([position]).ids)
        mean = torch.as_tensor(sum(sums.scores for sums in sums_of_ranks)) / len(samples)
        return cls(mean, norm, duplicates)


def accumulate(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add a value to a sum."""
    sums[name] = sums[name] + value if name in sums else value


def query_gradients(reader: Reader, query: Samples) -> _QueryGradients:
    """Return the queries' gradients, targets, losses and inputs."""
    task = reader.coverage.task
    batches_of_blocks: dict[str, list[FactoredGradients]] = {}
    targets, losses, inputs = [], [], []
    for batch in reader.per_sample_gradients(query, "queries"):
        for block, row in batch.loss_gradients().items():
            check_finite(row.outputs, f"query gradients of {block}")
            batches_of_blocks.setdefault(block, []).append(row)
        targets.append(batch.targets.detach().cpu())
        losses.append(batch.losses.detach().cpu())
        inputs.extend(_explained_inputs(task, batch.batch))
    gradients = {block: concatenate_samples(batches) for block, batches in batches_of_blocks.items()}
    return _QueryGradients(gradients, torch.cat(targets), torch.cat(losses), inputs)


def _explained_inputs(task: Task, batch: Any) -> list[Tensor]:
    """Return what of a batch is explained, a row per sample; of a list one by one, as it may hold an image for each."""
    inputs = task.inputs(batch)
    if not isinstance(inputs, list):
        return [task.explained(inputs)]
    return [task.explained(task.inputs(slice_samples(batch, i, i + 1))) for i in range(count_samples(batch))]


def check_finite(values: Tensor, what: str) -> Tensor:
    """Return values, detached.

    Raises:
        FloatingPointError: one is NaN or infinite.
    """
    if not bool(values.isfinite().all()):
        raise FloatingPointError(f"influence: {what} hold NaN or infinity")
    return values.detach()
