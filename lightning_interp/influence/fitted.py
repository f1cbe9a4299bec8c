"""A fitted influence function: asked about queries, about training samples themselves, and about groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_interp.capture import differentiable
from lightning_interp.influence.coverage import Coverage
from lightning_interp.influence.curvature import Curvature, Fitted, IdentityCurvature, Inverse
from lightning_interp.influence.curvature.curvature import Gradients, Scorer
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.keeping import Everything, Keeper, Kept, Top, overlap
from lightning_interp.influence.reading import Reader
from lightning_interp.influence.rows import Rows, stacked
from lightning_interp.records import Influence, SelfInfluence
from lightning_interp.samples import Samples
from lightning_interp.task import probabilities

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
    """

    reader: Reader
    train: Samples
    curvature: Curvature
    fitted: Fitted
    inverse: Inverse
    damping: Damping
    notes: tuple[str, ...]

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
            check: score a second time by `3 ×` the damping, and say how far the strongest 10 of each query agree.

        Raises:
            ValueError: there are no queries, or `top_k` and `scores_file` are both given.
            FloatingPointError: gradients or scores are not finite.
        """
        query = Samples.of(query)
        if not len(query):
            raise ValueError("query: expected samples, got none")
        if top_k is not None and (top_k < 1 or scores_file is not None):
            raise ValueError(f"top_k: expected a number from 1, without scores_file, got {top_k} and {scores_file}")
        chosen = self.train if candidates is None else self.train.at(candidates)
        path = None if scores_file is None else Path(scores_file)
        with differentiable(self.coverage.watch.model):
            asked = _asked(self.reader, query)
            keeper = Top(top_k, asked.targets) if top_k is not None else Everything(len(query), len(chosen), path)
            ways = [(self.inverse.against(asked.rows), keeper)]
            others = self._others() if check else {}
            ways += [(inverse.against(asked.rows), Top(COMPARED, asked.targets)) for inverse in others.values()]
            sums = self._score(chosen, ways)
        kept = [keeper.kept() for _, keeper in ways]
        agreement = {name: overlap(kept[0], kept[1 + place], COMPARED) for place, name in enumerate(others)}
        return self._record(chosen, asked, kept[0], sums, agreement)

    def self_influence(self) -> SelfInfluence:
        """Return ∇ℓ_iᵀ (H + Λ)⁻¹ ∇ℓ_i / n of every training sample: by how much its own loss would rise without it."""
        task = self.coverage.watch.task
        scores, losses, targets, suggested, chances = [], [], [], [], []
        with differentiable(self.coverage.watch.model):
            for trace in self.reader.traces(self.train, "self-influence"):
                scores.append(self.inverse.squares(trace.loss_rows()).cpu() / len(self.train))
                losses.append(trace.losses.detach().cpu())
                targets.append(trace.targets.detach().cpu())
                kind = task.problem(trace.outputs, trace.targets)
                if kind in ("classes", "binary") and trace.targets.numel() == len(trace):
                    chance = probabilities(trace.outputs, kind)
                    labels = trace.targets.reshape(-1, 1).long()
                    suggested.append(chance.argmax(1).cpu())
                    chances.append(chance.gather(1, labels)[:, 0].cpu())
        found = finite(torch.cat(scores), "self-influence")
        return SelfInfluence(
            found,
            torch.tensor(self.train.ids),
            torch.cat(targets),
            torch.cat(losses),
            torch.cat(suggested) if suggested else None,
            torch.cat(chances) if chances else torch.full_like(found, torch.nan),
        )

    def _others(self) -> dict[str, Inverse]:
        """Return other ways to the same ranking, which should not change it much."""
        shift = {block: CHECKED_BY * value for block, value in self.damping.shift(self.coverage).items()}
        return {f"{CHECKED_BY:g} × the damping": self.fitted.inverse(shift)}

    def _score(self, chosen: Samples, ways: Sequence[tuple[Scorer, Keeper]]) -> _Sums:
        scored: Tensor | None = None
        total: dict[str, Tensor] = {}
        for trace in self.reader.traces(chosen, "scoring training samples"):
            rows = trace.loss_rows()
            targets = trace.targets.detach().cpu()
            for place, (scorer, keeper) in enumerate(ways):
                scores = finite(scorer(rows), "scores").cpu() / len(self.train)
                keeper.add(scores, targets)
                if place == 0:
                    scored = scores.sum(1) if scored is None else scored + scores.sum(1)
            for block, row in rows.items():
                total[block] = total[block] + row.total() if block in total else row.total()
        norm = sum(float((sums / len(chosen)).double().square().sum()) for sums in total.values()) ** 0.5
        if scored is None:
            raise ValueError("candidates: expected training samples to score, got none")
        return _Sums(scored / len(chosen), norm)

    def _record(
        self, chosen: Samples, asked: _Asked, kept: Kept, sums: _Sums, agreement: dict[str, float]
    ) -> Influence:
        return Influence(
            scores=kept.scores,
            train_ids=torch.tensor(chosen.at(kept.places.tolist()).ids),
            train_targets=kept.targets,
            query_targets=asked.targets,
            query_losses=asked.losses,
            method=f"influence function, {self.curvature!r}",
            damping=self.damping.typical,
            covered=tuple(self.coverage.parameters),
            left_out=self.coverage.left_out,
            covered_elements=self.coverage.size,
            gradient_norm=sums.gradient_norm,
            curvature_n=self.fitted.n,
            notes=self._notes(kept.scores, len(chosen), asked),
            unit="none" if isinstance(self.curvature, IdentityCurvature) else "loss",
            places=kept.places,
            scored=len(chosen),
            mean=sums.mean,
            agreement=agreement,
        )

    def _notes(self, scores: Tensor, scored: int, asked: _Asked) -> tuple[str, ...]:
        notes = []
        if impossible := int((scores < -asked.losses[:, None]).sum()):
            notes.append(f"{impossible} scores predict a loss below zero: read their order, not their size")
        if self.damping.origin != "given":
            notes.append(f"damping: {self.damping.origin}")
        if scored < len(self.train):
            notes.append(
                f"{scored:,} of {len(self.train):,} training samples were scored; the others are not in the ranking"
            )
        return (*notes, *self.notes, *getattr(self.inverse, "notes", ()))


class _Asked(NamedTuple):
    rows: Gradients
    targets: Tensor
    losses: Tensor


class _Sums(NamedTuple):
    mean: Tensor
    gradient_norm: float


def _asked(reader: Reader, query: Samples) -> _Asked:
    parts: dict[str, list[Rows]] = {}
    targets, losses = [], []
    for trace in reader.traces(query, "queries"):
        for block, row in trace.loss_rows().items():
            finite(row.outputs, f"query gradients of {block}")
            parts.setdefault(block, []).append(row)
        targets.append(trace.targets.detach().cpu())
        losses.append(trace.losses.detach().cpu())
    return _Asked({block: stacked(held) for block, held in parts.items()}, torch.cat(targets), torch.cat(losses))


def finite(values: Tensor, what: str) -> Tensor:
    """Return values, detached.

    Raises:
        FloatingPointError: one is NaN or infinite.
    """
    if not bool(values.isfinite().all()):
        raise FloatingPointError(f"influence: {what} hold NaN or infinity")
    return values.detach()
