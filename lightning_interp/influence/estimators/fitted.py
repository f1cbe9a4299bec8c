"""A fitted influence function: asked about queries, about training samples themselves, and about groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_interp.data.samples import Samples
from lightning_interp.data.task import probabilities
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
from lightning_interp.influence.scores.top_k import AllScores, ScoreColumns, ScoreKeeper, TopScores, merged, overlap
from lightning_interp.network.undisturbed import differentiable

COMPARED = 10
CHECKED_BY = 3.0


@dataclass(frozen=True, eq=False)
class FittedInfluence:
    """Curvature estimated and inverted, ready for any number of questions.

    Args:
        reader: how samples go through the network.
        train: the training samples.
        curvature: as asked for, or chosen.
        fitted: estimated.
        inverse: damped and inverted.
        damping: that was added.
        notes: what to say of the curvature.
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
    def measured(self) -> bool:
        """Whether scores are in the loss's unit, and damping means something."""
        return in_loss_unit(self.curvature)

    @property
    def coverage(self) -> Coverage:
        """What of the network is covered."""
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
            query: dataset or loader of the samples whose losses are asked about.
            candidates: places in the training set to score; all when None.
            top_k: keep only so many of each query's most helpful, harmful and surprisingly helpful samples: memory then
                does not grow with the training set.
            scores_file: keep all scores in this `.npy` file, mapped into memory.
            check: score a second time by `3 ×` the damping, and by each half of a projection where there is one, and
                say how far the strongest 10 of each query agree; look for the queries among the samples.

        Raises:
            ValueError: there are no queries, or `top_k` and `scores_file` are both given.
            FloatingPointError: gradients or scores are not finite.
        """
        query = Samples.of(query)
        if not len(query):
            raise ValueError("query: expected samples, got none")
        if top_k is not None and (top_k < 1 or scores_file is not None):
            raise ValueError(f"top_k: expected a number from 1, without scores_file, got {top_k} and {scores_file}")
        if scores_file is not None and self.reader.ranks.count > 1:
            raise ValueError("scores_file: expected one process, got several; pass top_k")
        chosen = self.train if candidates is None else self.train.at(candidates)
        if not len(chosen):
            raise ValueError("candidates: expected training samples to score, got none")
        mine, places = share_of_rank(chosen, self.reader.ranks)
        path = None if scores_file is None else Path(scores_file)
        with differentiable(self.coverage.model):
            asked = query_gradients(self.reader, self.reader.rebatch(query))
            keeper = TopScores(top_k, asked.targets) if top_k is not None else AllScores(len(query), len(mine), path)
            ways = [(self.inverse.against(asked.rows), keeper)]
            others = self._others() if check else {}
            ways += [(inverse.against(asked.rows), TopScores(COMPARED, asked.targets)) for inverse in others.values()]
            same = Duplicates(asked.inputs) if check else None
            sums = self._score(mine, ways, same)
        found = [keeper.kept().at(places) for _, keeper in ways] if len(mine) else []
        pairs = [] if same is None else [(row, places[place]) for row, place in same.found]
        parts = self.reader.ranks.gather((found, sums, pairs))
        kept = [merged(held) for held in zip(*(found for found, _, _ in parts if found), strict=True)]
        totals = _Totals.of([sums for _, sums, _ in parts], chosen, [pairs for _, _, pairs in parts])
        agreement = {name: overlap(kept[0], kept[1 + place], COMPARED) for place, name in enumerate(others)}
        notes = tuple(getattr(ways[0][0], "notes", ()))
        return self._record(chosen, asked, kept[0], totals, agreement, notes)

    def self_influence(self, candidates: Sequence[int] | None = None) -> SelfInfluence:
        """Return ∇ℓ_iᵀ (H + Λ)⁻¹ ∇ℓ_i / n of training samples: by how much a sample's own loss would rise without it.

        Args:
            candidates: places in the training set; all when None.
        """
        chosen = self.train if candidates is None else self.train.at(candidates)
        mine, places = share_of_rank(chosen, self.reader.ranks)
        with differentiable(self.coverage.model):
            found = [self._of_itself(trace) for trace in self.reader.per_sample_gradients(mine, "self-influence")]
        whole = self.reader.ranks.gather((found, list(places)))
        order = torch.tensor([place for _, held in whole for place in held]).argsort()
        columns = [torch.cat(column)[order] for column in zip(*(row for rows, _ in whole for row in rows), strict=True)]
        scores, losses, targets, suggested, chance = columns
        classes = bool((suggested >= 0).all())
        return SelfInfluence(
            check_finite(scores, "self-influence"),
            torch.tensor(chosen.ids),
            targets,
            losses,
            suggested if classes else None,
            chance,
        )

    def _of_itself(self, trace: PerSampleGradients) -> tuple[Tensor, ...]:
        """Return self-influence, loss, target, predicted class (−1 for none) and the label's probability of a batch."""
        task = self.coverage.task
        scores = self.inverse.squares(trace.loss_gradients()).cpu() / len(self.train)
        kind = task.problem(trace.outputs, trace.targets)
        suggested, chance = torch.full((len(trace),), -1), torch.full((len(trace),), torch.nan)
        if kind in ("classes", "binary") and trace.targets.numel() == len(trace):
            chances = probabilities(trace.outputs, kind).cpu()
            suggested = chances.argmax(1)
            chance = chances.gather(1, trace.targets.reshape(-1, 1).long().cpu())[:, 0]
        return scores, trace.losses.detach().cpu(), trace.targets.detach().cpu(), suggested, chance

    def _others(self) -> dict[str, Inverse]:
        """Return other ways to the same ranking, which should not change it much."""
        shift = {block: CHECKED_BY * value for block, value in self.damping.shift(self.coverage).items()}
        halves = zip(("one half", "the other half"), getattr(self.inverse, "halves", ()), strict=False)
        return {
            f"{CHECKED_BY:g} × the damping": self.fitted.inverse(shift),
            **{f"{which} of the projection": half for which, half in halves},
        }

    def _score(self, chosen: Samples, ways: Sequence[tuple[Scorer, ScoreKeeper]], same: Duplicates | None) -> _Sums:
        scored: Tensor | float = 0.0
        total: dict[str, Tensor] = {}
        for trace in self.reader.per_sample_gradients(chosen, "scoring training samples"):
            rows = trace.loss_gradients(keep_graph=self.leverage)
            targets = trace.targets.detach().cpu()
            for place, (scorer, keeper) in enumerate(ways):
                found = self._leveraged(trace, rows, scorer) if self.leverage and place == 0 else scorer(rows)
                scores = check_finite(found, "scores").cpu() / len(self.train)
                keeper.add(scores, targets)
                if place == 0:
                    scored = scored + scores.sum(1)
            for block, row in rows.items():
                accumulate(total, block, row.sum())
            if same is not None:
                same.look(self._explained(trace))
        return _Sums(scored, {block: value.cpu() for block, value in total.items()})

    def _leveraged(self, trace: PerSampleGradients, rows: Gradients, scorer: Scorer) -> Tensor:
        task = self.coverage.task
        return leverage_scores(trace, rows, scorer, self.inverse, task, len(self.train))

    def _explained(self, trace: PerSampleGradients) -> Tensor:
        task = self.coverage.task
        return task.explained(task.inputs(trace.batch))

    def _record(
        self,
        chosen: Samples,
        asked: _QueryGradients,
        kept: ScoreColumns,
        totals: _Totals,
        agreement: dict[str, float],
        notes: tuple[str, ...],
    ) -> Influence:
        return Influence(
            scores=kept.scores,
            train_ids=torch.tensor(_ids(chosen, kept.places)),
            train_targets=kept.targets,
            query_targets=asked.targets,
            query_losses=asked.losses,
            method=f"influence function, {self.curvature!r}",
            damping=self.damping.typical if self.measured else torch.nan,
            covered=tuple(self.coverage.parameter_sizes),
            left_out=self.coverage.left_out,
            covered_elements=self.coverage.size,
            gradient_norm=totals.gradient_norm,
            curvature_n=self.fitted.n,
            notes=(*self._notes(kept.scores, len(chosen), asked), *notes),
            unit="loss" if self.measured else "none",
            places=kept.places,
            scored=len(chosen),
            mean=totals.mean,
            agreement=agreement,
            duplicates=totals.duplicates,
        )

    def _notes(self, scores: Tensor, scored: int, asked: _QueryGradients) -> tuple[str, ...]:
        notes = []
        impossible = int((scores < -asked.losses[:, None]).sum())
        if impossible and self.measured:
            notes.append(f"{impossible} scores predict a loss below zero: read their order, not their size")
        if self.damping.origin != "given" and self.measured:
            notes.append(f"damping: {self.damping.origin}")
        if scored < len(self.train):
            notes.append(
                f"{scored:,} of {len(self.train):,} training samples were scored; the others are not in the ranking"
            )
        return (*notes, *self.notes)


def _ids(chosen: Samples, places: Tensor) -> list[int]:
    """Return the dataset indices of samples at these ascending places."""
    return chosen.ids if len(places) == len(chosen) else chosen.at(places.tolist()).ids


class _QueryGradients(NamedTuple):
    rows: Gradients
    targets: Tensor
    losses: Tensor
    inputs: list[Tensor]


class _Sums(NamedTuple):
    """Sums over training samples: of each query's scores, and of the gradients."""

    scores: Tensor | float
    gradients: dict[str, Tensor]


class _Totals(NamedTuple):
    """What all ranks' parts come to."""

    mean: Tensor
    gradient_norm: float
    duplicates: dict[int, tuple[int, ...]]

    @classmethod
    def of(cls, parts: Sequence[_Sums], chosen: Samples, found: Sequence[Sequence[tuple[int, int]]]) -> _Totals:
        """Return each query's mean score, the norm of the mean gradient, and the queries among the samples."""
        gradients: dict[str, Tensor] = {}
        for part in parts:
            for name, value in part.gradients.items():
                accumulate(gradients, name, value)
        norm = sum(float((total / len(chosen)).double().square().sum()) for total in gradients.values()) ** 0.5
        same: dict[int, tuple[int, ...]] = {}
        for query, place in sorted(pair for pairs in found for pair in pairs):
            same[query] = (*same.get(query, ()), *chosen.at([place]).ids)
        return cls(torch.as_tensor(sum(part.scores for part in parts)) / len(chosen), norm, same)


def accumulate(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add a value to a sum."""
    sums[name] = sums[name] + value if name in sums else value


def query_gradients(reader: Reader, query: Samples) -> _QueryGradients:
    """Return the queries' gradients, targets, losses and inputs."""
    task = reader.coverage.task
    parts: dict[str, list[FactoredGradients]] = {}
    targets, losses, inputs = [], [], []
    for trace in reader.per_sample_gradients(query, "queries"):
        for block, row in trace.loss_gradients().items():
            check_finite(row.outputs, f"query gradients of {block}")
            parts.setdefault(block, []).append(row)
        targets.append(trace.targets.detach().cpu())
        losses.append(trace.losses.detach().cpu())
        inputs.append(task.explained(task.inputs(trace.batch)))
    rows = {block: concatenate_samples(held) for block, held in parts.items()}
    return _QueryGradients(rows, torch.cat(targets), torch.cat(losses), inputs)


def check_finite(values: Tensor, what: str) -> Tensor:
    """Return values, detached.

    Raises:
        FloatingPointError: one is NaN or infinite.
    """
    if not bool(values.isfinite().all()):
        raise FloatingPointError(f"influence: {what} hold NaN or infinity")
    return values.detach()
