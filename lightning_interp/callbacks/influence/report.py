"""From influence scores to what a reader sees: ranked lists, galleries, cards and rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp.callbacks.influence.suspects import SHOWN, SuspectRow, suspect_rows, suspects_of, suspects_picture
from lightning_interp.checks import markdown
from lightning_interp.data.samples import Samples
from lightning_interp.data.task import Problem, Task, predict_classes
from lightning_interp.influence.results import Influence, SelfInfluence, SpotCheck
from lightning_interp.influence.trust import Duplicate, Trust, meaning, trust
from lightning_interp.views import report
from lightning_interp.views.canvas import Pixels
from lightning_interp.views.describe import target_in_words, view_by_index, view_samples
from lightning_interp.views.display import Display, SampleView
from lightning_interp.views.influence import spot_scatter
from lightning_interp.views.sample import WRONG, columns_of, gallery, tail, verdict
from lightning_interp.views.sample_html import (
    InfluenceList,
    QueryCard,
    RetrainingCheck,
    ScoredSample,
    SuspectSample,
    sample_html,
)

ROWS_IN_CSV = 100
ABOUT = {
    "Helpful": "leaving one out raises the query's loss",
    "Harmful": "leaving one out lowers it",
    "Surprisingly helpful": "most helpful of another class",
}


class RankedList(NamedTuple):
    """One list of training samples: columns of the scores, best first, and their scores."""

    heading: str
    columns: list[int]
    scores: list[float]


class InfluenceReport(NamedTuple):
    """All that is shown of one influence record.

    Args:
        galleries: query id → picture.
        cards: one per query, for the report.
        rows: for `influence.csv`.
        summary: Markdown.
        trust: how far to trust the scores.
        section: the report's part on influence, HTML.
        suspects_picture: the training samples to look at first; None where they were not asked for.
        suspect_rows: for `self_influence.csv`.
        spot_picture: predicted against actual; None where nothing was checked.
    """

    galleries: dict[str, Pixels]
    cards: list[QueryCard]
    rows: list[tuple[SampleView, float, str, int, int, SampleView, float]]
    summary: str
    trust: Trust
    section: str
    suspects_picture: Pixels | None
    suspect_rows: list[SuspectRow]
    spot_picture: Pixels | None


def describe_influence(
    model: nn.Module,
    task: Task,
    found: Influence,
    train: Samples,
    query: Samples,
    top: int,
    display: Display,
    suspects: SelfInfluence | None = None,
    duplicates: Mapping[int, Sequence[int]] | None = None,
    spot_checks: Sequence[SpotCheck] = (),
) -> InfluenceReport:
    """Make everything that is shown.

    Args:
        model: in eval mode.
        task: how to call it.
        found: the scores.
        train: the training set, or as much of it as was scored.
        query: the queries, one per row.
        top: how many samples to show of each kind.
        display: how samples are shown.
        suspects: self-influence of the training samples.
        duplicates: row of a query → dataset indices of the training samples that are the same; those that the record
            names when None.
        spot_checks: scores that retraining has checked.
    """
    queries = view_samples(model, task, query, display)
    shown_lists = [ranked_lists(found, place, top, task.kind) for place in range(len(queries))]
    columns = {column for lists in shown_lists for ranked in lists for column in ranked.columns}
    index = {column: int(found.train_ids[column]) for column in columns}
    held = view_by_index(model, task, train, index.values(), display)
    named = {column: held[index[column]] for column in columns}
    cards = [
        _card(shown, loss, lists, named, display)
        for shown, loss, lists in zip(queries, found.query_losses.tolist(), shown_lists, strict=True)
    ]
    doubted = suspects_of(model, task, suspects, train, display, max(SHOWN, 2 * top)) if suspects else []
    same = found.duplicates if duplicates is None else duplicates
    trusted = trust(found, _duplicates(found, queries, same), spot_checks)
    checked = _checked(spot_checks, display) if spot_checks else None
    return InfluenceReport(
        galleries={card.view.id: _gallery(card, display) for card in cards},
        cards=cards,
        rows=_rows(found, queries, display, task.kind),
        summary=_summary(found, trusted, doubted),
        trust=trusted,
        section=report.influence_section(found, cards, doubted, trusted, checked),
        suspects_picture=suspects_picture(doubted, len(suspects.scores) if suspects else 0, display),
        suspect_rows=suspect_rows(suspects, task.kind, display) if suspects else [],
        spot_picture=None if checked is None else checked.picture,
    )


def strangeness(task: Task, outputs: Tensor, targets: Tensor, losses: Tensor) -> Tensor:
    """Return what to sort queries by, `(n,)`: wrong answers by their probability, then the rest by loss."""
    kind = task.problem(outputs, targets)
    if kind not in ("classes", "binary") or targets.numel() != len(outputs):
        return losses.detach()
    chosen, chance = predict_classes(outputs, kind)
    wrong = chosen != targets.reshape(-1).to(chosen)
    return torch.where(wrong, 1 + chance, -torch.expm1(-losses.detach()).to(chance))


def ranked_lists(found: Influence, query: int, top: int, kind: Problem | None) -> list[RankedList]:
    """Return a query's helpful, harmful and, for classes, surprisingly helpful training samples."""
    scores = found.scores[query]
    lists = [_best(scores, "Helpful", top), _best(-scores, "Harmful", top)]
    if kind in ("classes", "binary") and found.train_targets.numel() == len(scores):
        same = found.train_targets.reshape(-1) == found.query_targets[query].reshape(-1)
        other = scores.masked_fill(same, 0.0)
        lists.append(_best(other, "Surprisingly helpful", top))
    return lists


def _best(scores: Tensor, heading: str, top: int) -> RankedList:
    """Return the `top` largest of the positive scores; a harmful list comes in with its sign turned."""
    best = scores.topk(min(top, len(scores)))
    kept = best.values > 0
    values = best.values[kept] if heading != "Harmful" else -best.values[kept]
    return RankedList(heading, best.indices[kept].tolist(), values.tolist())


def _card(
    query: SampleView, loss: float, lists: Sequence[RankedList], held: Mapping[int, SampleView], display: Display
) -> QueryCard:
    columns = columns_of(query.value)

    def scored(column: int, score: float) -> ScoredSample:
        return ScoredSample(held[column], score, sample_html(held[column].value, display, columns))

    rankings = [
        InfluenceList(r.heading, ABOUT[r.heading], [scored(*pair) for pair in zip(r.columns, r.scores, strict=True)])
        for r in lists
    ]
    return QueryCard(query, loss, sample_html(query.value, display, columns), rankings)


def _gallery(card: QueryCard, display: Display) -> Pixels:
    rows = [
        (f"{heading}: {about}", [(held.view, _note(held.view, held.score)) for held in samples])
        for heading, about, samples in card.lists
    ]
    true, *answer = verdict(card.view).split("   ")
    answer = [f"{WRONG if card.view.wrong else ''}{said}" for said in answer]
    note = "\n".join((f"query #{tail(card.view.id)}", true, *answer, f"loss {card.loss:.3g}"))
    return gallery(card.view, note, rows, display)


def _note(view: SampleView, score: float) -> str:
    differs = f"\n{WRONG}predicted {view.prediction}" if view.wrong else ""
    return f"#{tail(view.id)}\nlabel {view.label}\n{score:+.2e}{differs}"


def _duplicates(
    found: Influence, queries: Sequence[SampleView], duplicates: Mapping[int, Sequence[int]]
) -> list[Duplicate]:
    columns = {int(index): column for column, index in enumerate(found.train_ids)}

    def duplicate(query: int, index: int) -> Duplicate:
        if index not in columns:
            return Duplicate(queries[query].id, index, math.nan)
        column = columns[index]
        contradicts = not torch.equal(found.train_targets[column], found.query_targets[query])
        return Duplicate(queries[query].id, index, float(found.scores[query, column]), contradicts)

    return [duplicate(query, int(index)) for query, indices in duplicates.items() for index in indices]


def _checked(checks: Sequence[SpotCheck], display: Display) -> RetrainingCheck:
    rows = [
        (f"#{display.id(c.query)}", f"#{display.id(c.train_index)}", f"{c.predicted:+.2e}", f"{c.actual:+.2e}")
        for c in checks
    ]
    what = "" if all(check.whole for check in checks) else " the last layer alone"
    return RetrainingCheck(rows, spot_scatter(checks), f"Checked by retraining{what}")


def _rows(
    found: Influence, queries: Sequence[SampleView], display: Display, kind: Problem | None
) -> list[tuple[SampleView, float, str, int, int, SampleView, float]]:
    rows = []
    for place, query in enumerate(queries):
        for heading, columns, scores in ranked_lists(found, place, ROWS_IN_CSV, kind):
            for rank, (column, score) in enumerate(zip(columns, scores, strict=True), start=1):
                index = int(found.train_ids[column])
                train = SampleView(display.id(index), None, target_in_words(found.train_targets[column], kind, display))
                rows.append((query, float(found.query_losses[place]), heading.lower(), rank, index, train, score))
    return rows


def _summary(found: Influence, trusted: Trust, doubted: Sequence[SuspectSample]) -> str:
    rows = [("what", "how much"), *((name, said.replace("|", "\\|")) for name, said in trusted.rows)]
    lines = [meaning(found.unit), f"**How far to trust them: {trusted.level}.** {trusted.sentence}."]
    if doubted:
        named = ", ".join(f"#{held.view.id}" for held in doubted[:8])
        lines.append(f"**Look first** at the training samples with the largest self-influence: {named}.")
    return "\n\n".join([*lines, markdown(rows)])
