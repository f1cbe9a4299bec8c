"""A fitted influence function: asked about queries, about training samples themselves, and about groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_interp.capture import differentiable
from lightning_interp.influence.coverage import Coverage
from lightning_interp.influence.curvature import Curvature, Fitted, Inverse
from lightning_interp.influence.curvature.curvature import Gradients, Scorer
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.reading import Reader
from lightning_interp.influence.rows import Rows, stacked
from lightning_interp.records import Influence
from lightning_interp.samples import Samples


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

    def __call__(self, query: Any, candidates: Sequence[int] | None = None, top_k: int | None = None) -> Influence:
        """Score training samples for each query (see `InfluenceFunction.__call__`)."""
        with differentiable(self.coverage.watch.model):
            asked = _asked(self.reader, Samples.of(query))
            chosen = self.train if candidates is None else self.train.at(candidates)
            scorer = self.inverse.against(asked.rows)
            scored = self._score(chosen, scorer)
        return Influence(
            scores=finite(scored.scores, "scores"),
            train_ids=torch.tensor(chosen.ids),
            train_targets=scored.targets,
            query_targets=asked.targets,
            query_losses=asked.losses,
            method=f"influence function, {self.curvature!r}",
            damping=self.damping.typical,
            covered=tuple(self.coverage.parameters),
            left_out=self.coverage.left_out,
            covered_elements=self.coverage.size,
            gradient_norm=scored.gradient_norm,
            curvature_n=self.fitted.n,
            notes=(*self._notes(scored.scores, asked), *getattr(scorer, "notes", ())),
        )

    def self_influence(self) -> Tensor:
        """Return ∇ℓ_iᵀ (H + Λ)⁻¹ ∇ℓ_i / n of every training sample, `(n,)`: by how much its own loss would rise."""
        n = len(self.train)
        with differentiable(self.coverage.watch.model):
            traces = self.reader.traces(self.train, "scoring training samples")
            found = [self.inverse.squares(trace.loss_rows()).cpu() / n for trace in traces]
        return finite(torch.cat(found), "self-influence")

    def _score(self, chosen: Samples, scorer: Scorer) -> _Scored:
        scores, targets = [], []
        total: dict[str, Tensor] = {}
        for trace in self.reader.traces(chosen, "scoring training samples"):
            rows = trace.loss_rows()
            scores.append(scorer(rows).cpu() / len(self.train))
            for block, row in rows.items():
                total[block] = total[block] + row.total() if block in total else row.total()
            targets.append(trace.targets.detach().cpu())
        norm = sum(float((sums / len(chosen)).double().square().sum()) for sums in total.values()) ** 0.5
        return _Scored(torch.cat(scores, dim=1), torch.cat(targets), norm)

    def _notes(self, scores: Tensor, asked: _Asked) -> tuple[str, ...]:
        notes = []
        if impossible := int((scores < -asked.losses[:, None]).sum()):
            notes.append(f"{impossible} scores predict a loss below zero: read their order, not their size")
        if self.damping.origin != "given":
            notes.append(f"damping: {self.damping.origin}")
        if scores.shape[1] < len(self.train):
            notes.append(
                f"{scores.shape[1]:,} of {len(self.train):,} training samples were scored;"
                " the others are not in the ranking"
            )
        return (*notes, *self.notes)


class _Asked(NamedTuple):
    rows: Gradients
    targets: Tensor
    losses: Tensor


class _Scored(NamedTuple):
    scores: Tensor
    targets: Tensor
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
