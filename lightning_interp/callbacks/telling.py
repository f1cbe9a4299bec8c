"""From influence scores to what a reader sees: ranked lists, galleries, cards and rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_interp import panels
from lightning_interp.callbacks.showing import shown_samples
from lightning_interp.display import Display, kind_of
from lightning_interp.figures import png
from lightning_interp.records import Influence, Pixels, Shown
from lightning_interp.samples import Samples
from lightning_interp.task import Problem, Task, predicted

ROWS_IN_CSV = 100
ABOUT = {
    "Helpful": "leaving one out raises the query's loss",
    "Harmful": "leaving one out lowers it",
    "Surprisingly helpful": "most helpful of another class",
}


class Ranked(NamedTuple):
    """One list of training samples: columns of the scores, best first, and their scores."""

    heading: str
    columns: list[int]
    scores: list[float]


class Told(NamedTuple):
    """All that is shown of one influence record.

    Args:
        galleries: query id → picture.
        cards: one per query, for the report.
        rows: for the CSV.
        summary: Markdown.
    """

    galleries: dict[str, Pixels]
    cards: list[dict[str, Any]]
    rows: list[tuple[Shown, float, str, int, int, Shown, float]]
    summary: str


def tell(
    model: nn.Module, task: Task, found: Influence, train: Samples, query: Samples, top: int, display: Display
) -> Told:
    """Make everything that is shown.

    Args:
        model: in eval mode.
        task: how to call it.
        found: the scores.
        train: the scored samples, one per column.
        query: the queries, one per row.
        top: how many samples to show of each kind.
        display: how samples are shown.
    """
    queries = _look(model, task, query, display)
    shown_lists = [ranked_lists(found, place, top, task.kind) for place in range(len(queries))]
    columns = sorted({column for lists in shown_lists for ranked in lists for column in ranked.columns})
    held = dict(zip(columns, _look(model, task, train.at(columns), display) if columns else [], strict=True))
    galleries, cards = {}, []
    for shown, loss, lists in zip(queries, found.query_losses.tolist(), shown_lists, strict=True):
        galleries[shown.id] = _gallery(shown, loss, lists, held, display)
        cards.append(_card(shown, loss, lists, held, display))
    return Told(galleries, cards, _rows(found, queries, display, task.kind), _summary(found))


def strangeness(task: Task, outputs: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
    """Return what to sort queries by, `(n,)`: wrong answers by their probability, then the rest by loss."""
    kind = task.problem(outputs, targets)
    if kind not in ("classes", "binary") or targets.numel() != len(outputs):
        return losses.detach()
    chosen, chance = predicted(outputs, kind)
    wrong = chosen != targets.reshape(-1).to(chosen)
    return torch.where(wrong, 1 + chance, -torch.expm1(-losses.detach()).to(chance))


def ranked_lists(found: Influence, query: int, top: int, kind: Problem | None) -> list[Ranked]:
    """Return a query's helpful, harmful and, for classes, surprisingly helpful training samples."""
    scores = found.scores[query]
    lists = [_best(scores, "Helpful", top), _best(-scores, "Harmful", top)]
    if kind in ("classes", "binary") and found.train_targets.numel() == len(scores):
        same = found.train_targets.reshape(-1) == found.query_targets[query].reshape(-1)
        other = scores.masked_fill(same, 0.0)
        lists.append(_best(other, "Surprisingly helpful", top))
    return lists


def _best(scores: Tensor, heading: str, top: int) -> Ranked:
    """Return the `top` largest of the positive scores; a harmful list comes in with its sign turned."""
    best = scores.topk(min(top, len(scores)))
    kept = best.values > 0
    values = best.values[kept] if heading != "Harmful" else -best.values[kept]
    return Ranked(heading, best.indices[kept].tolist(), values.tolist())


def _look(model: nn.Module, task: Task, samples: Samples, display: Display) -> list[Shown]:
    shown: list[Shown] = []
    ids = samples.ids
    with torch.no_grad():
        for batch in samples:
            outputs = task.outputs(model, task.inputs(batch))
            n = len(outputs)
            shown += shown_samples(batch, outputs, task, ids[len(shown) : len(shown) + n], display)
    return shown


def _gallery(query: Shown, loss: float, lists: Sequence[Ranked], held: dict[int, Shown], display: Display) -> Pixels:
    rows = [
        (
            f"{r.heading}: {ABOUT[r.heading]}",
            [(held[c], _note(held[c], s)) for c, s in zip(r.columns, r.scores, strict=True)],
        )
        for r in lists
    ]
    note = "\n".join(("query #" + query.id, *panels.verdict(query).split("   "), f"loss {loss:.3g}"))
    return panels.gallery(query, note, rows, display)


def _note(shown: Shown, score: float) -> str:
    differs = f"\npred. {shown.prediction}" if shown.wrong else ""
    return f"#{shown.id}: {shown.label}\n{score:+.2e}{differs}"


def _card(
    query: Shown, loss: float, lists: Sequence[Ranked], held: dict[int, Shown], display: Display
) -> dict[str, Any]:
    def samples(ranked: Ranked) -> list[tuple[Shown, float, bytes]]:
        pairs = zip(ranked.columns, ranked.scores, strict=True)
        return [(held[c], score, _png(held[c], display)) for c, score in pairs]

    return {
        "shown": query,
        "loss": loss,
        "image": kind_of(query.value) == "image",
        "picture": _png(query, display),
        "lists": [(r.heading, ABOUT[r.heading], samples(r)) for r in lists],
    }


def _png(shown: Shown, display: Display) -> bytes:
    return png(np.asarray(panels.picture(shown.value, display)))


def _rows(
    found: Influence, queries: Sequence[Shown], display: Display, kind: Problem | None
) -> list[tuple[Shown, float, str, int, int, Shown, float]]:
    rows = []
    for place, query in enumerate(queries):
        for heading, columns, scores in ranked_lists(found, place, ROWS_IN_CSV, kind):
            for rank, (column, score) in enumerate(zip(columns, scores, strict=True), start=1):
                index = int(found.train_ids[column])
                train = Shown(display.id(index), None, display.label(found.train_targets[column]))
                rows.append((query, float(found.query_losses[place]), heading.lower(), rank, index, train, score))
    return rows


def _summary(found: Influence) -> str:
    left_out = f"; left out: {', '.join(found.left_out)}" if found.left_out else ""
    lines = [
        "A score is the predicted rise of the query's loss if the training sample were left out, in units of the loss."
        " Positive is helpful, negative harmful."
        " Read the order: away from an optimum the sizes can be many times too large.",
        f"**Method**: {found.method}, curvature from {found.curvature_n:,} samples, damping λ = {found.damping:.3g}.",
        f"**Training samples scored**: {found.scores.shape[1]:,}.",
        f"**Parameters covered**: {100 * found.coverage:.1f}% ({found.covered_elements:,}){left_out}.",
        f"**Norm of the mean training gradient**: {found.gradient_norm:.3g} (0 at an optimum).",
    ]
    return "\n\n".join(lines + [f"**Note**: {note}." for note in found.notes])
