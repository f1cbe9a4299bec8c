"""What is reported of influence scores: each query's lists, samples to look at first, how far to trust the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lightning_interp.callbacks.publish import Findings
from lightning_interp.checks import clean
from lightning_interp.data.samples import Samples
from lightning_interp.data.task import Problem, Task
from lightning_interp.influence.results import Influence, SelfInfluence, SpotCheck
from lightning_interp.influence.trust import Duplicate, Trust, meaning, trust
from lightning_interp.views.canvas import Pixels
from lightning_interp.views.describe import target_in_words, view_by_index, view_samples
from lightning_interp.views.display import Display, SampleView
from lightning_interp.views.influence import spot_scatter, suspects_sheet
from lightning_interp.views.report import (
    Block,
    Heading,
    Paragraph,
    Picture,
    Queries,
    Section,
    SpotChecks,
    Suspects,
    Table,
    Verdict,
)
from lightning_interp.views.sample import WRONG, columns_of, gallery, shortened_name, verdict
from lightning_interp.views.sample_html import InfluenceList, QueryCard, ScoredSample, SuspectSample, sample_html
from lightning_interp.views.tables import as_csv, as_markdown

INFLUENCE_TITLE = "Which training samples made it so"
SUSPECTS_SHOWN = 24  # three rows of eight images
RANKS_IN_CSV = 100  # of each of a query's lists; `scores.safetensors` holds at least as many
SUSPECTS_IN_CSV = 100_000  # a table of about 6 MB, which spreadsheets still open
FILES_OF_SOME_REPORTS = ("query-*.png", "look-at-first.png", "spot-check.png", "self_influence.csv")
SPOT_CHECK_TAG = "influence/spot_check"
LIST_MEANINGS = {
    "Helpful": "leaving one out raises the query's loss",
    "Harmful": "leaving one out lowers it",
    "Surprisingly helpful": "most helpful of another class",
}
SUSPECTS_MEANING = (
    "Those with the largest self-influence: leaving one out would raise its own loss most, because little else in the"
    " training set speaks for its label. Mislabelled and odd samples come first."
)


class RankedList(NamedTuple):
    """One list of training samples: columns of the scores, best first, and their scores."""

    heading: str
    columns: list[int]
    scores: list[float]


class InfluenceRow(NamedTuple):
    """A line of `influence.csv`."""

    query_id: str
    query_label: str
    query_prediction: str
    query_loss: float
    list: str
    rank: int
    train_index: int
    train_id: str
    train_label: str
    score: float


class SuspectRow(NamedTuple):
    """A line of `self_influence.csv`; no suggested label, and NaN as its probability, where there are no classes."""

    rank: int
    train_index: int
    train_id: str
    label: str
    suggested_label: str
    label_probability: float
    self_influence: float
    loss: float


@dataclass(frozen=True, eq=False)
class InfluenceReport:
    """All that is reported of one influence record.

    Args:
        influence: the scores.
        trust: how far to trust them.
        cards: one for each query.
        rows: for `influence.csv`.
        suspects: training samples to look at first; empty where self-influence was not computed.
        suspect_rows: for `self_influence.csv`.
        n_self_influence: number of training samples whose self-influence was computed.
        spot_checks: scores that retraining has checked.
        display: how samples are shown.
    """

    influence: Influence
    trust: Trust
    cards: list[QueryCard]
    rows: list[InfluenceRow]
    suspects: list[SuspectSample]
    suspect_rows: list[SuspectRow]
    n_self_influence: int
    spot_checks: Sequence[SpotCheck]
    display: Display


def describe_influence(
    model: nn.Module,
    task: Task,
    influence: Influence,
    train: Samples,
    query: Samples,
    top: int,
    display: Display,
    self_influence: SelfInfluence | None = None,
    duplicates: Mapping[int, Sequence[int]] | None = None,
    spot_checks: Sequence[SpotCheck] = (),
) -> InfluenceReport:
    """Gather everything that is reported.

    Args:
        model: in eval mode.
        task: how to call it.
        influence: the scores.
        train: the training set, or as much of it as was scored.
        query: the queries, one per row.
        top: how many samples to show of each kind.
        display: how samples are shown.
        self_influence: of the training samples.
        duplicates: row of a query → dataset indices of the training samples that are the same; those that the record
            names when None.
        spot_checks: scores that retraining has checked.
    """
    queries = view_samples(model, task, query, display)
    lists = [ranked_lists(influence, row, top, task.kind) for row in range(len(queries))]
    columns = {column for lists_of_query in lists for ranked in lists_of_query for column in ranked.columns}
    index_of = {column: int(influence.train_ids[column]) for column in columns}
    views = view_by_index(model, task, train, index_of.values(), display)
    train_views = {column: views[index] for column, index in index_of.items()}
    cards = [
        _card(view, loss, lists_of_query, train_views, display)
        for view, loss, lists_of_query in zip(queries, influence.query_losses.tolist(), lists, strict=True)
    ]
    repeated = _duplicates(influence, queries, influence.duplicates if duplicates is None else duplicates)
    count = max(SUSPECTS_SHOWN, 2 * top)
    return InfluenceReport(
        influence=influence,
        trust=trust(influence, repeated, spot_checks),
        cards=cards,
        rows=_influence_rows(influence, queries, display, task.kind),
        suspects=_suspects(model, task, self_influence, train, display, count) if self_influence else [],
        suspect_rows=_suspect_rows(self_influence, task.kind, display) if self_influence else [],
        n_self_influence=len(self_influence.scores) if self_influence else 0,
        spot_checks=spot_checks,
        display=display,
    )


def influence_findings(report: InfluenceReport, step: int) -> Findings:
    """Return the report as findings to publish at an optimizer step."""
    pictures = _influence_pictures(report, step)
    scores = {"scores": report.influence.scores.float().contiguous(), "train_index": report.influence.train_ids}
    files: dict[str, bytes | str] = {
        "influence.csv": as_csv(InfluenceRow._fields, report.rows),
        "scores.safetensors": save(scores),
    }
    if report.suspect_rows:
        files["self_influence.csv"] = as_csv(SuspectRow._fields, report.suspect_rows)
    return Findings(
        step=step,
        section=_section(report, pictures),
        pictures=list(pictures.values()),
        texts={"influence_notes/summary": summary(report)},
        files=files,
        outdated=FILES_OF_SOME_REPORTS,
        own_report="Training-data influence",
    )


def _influence_pictures(report: InfluenceReport, step: int) -> dict[str, Picture]:
    """Return tag → picture: each query's gallery, the samples to look at first, and the spot checks."""
    pictures = []
    for card in report.cards:
        name, file = card.view.id, f"query-{clean(card.view.id).replace('/', '_')}"
        draw = partial(draw_card, display=report.display)
        pictures.append(Picture(f"influence/query_{name}", file, step, card, draw))
    if report.suspects:
        pictures.append(Picture("influence/look_at_first", "look-at-first", step, report, draw_suspects))
    if report.spot_checks:
        pictures.append(Picture(SPOT_CHECK_TAG, "spot-check", step, report.spot_checks, spot_scatter))
    return {picture.tag: picture for picture in pictures}


def _section(report: InfluenceReport, pictures: Mapping[str, Picture]) -> Section:
    blocks: list[Block] = [Paragraph(meaning(report.influence.unit)), Verdict(report.trust), Queries(report.cards)]
    if report.suspects:
        disagrees = any(suspect.view.wrong for suspect in report.suspects)
        in_red = " Where the network suggests another label, it is in red." if disagrees else ""
        blocks += [Heading("Look at these training samples first"), Paragraph(SUSPECTS_MEANING + in_red)]
        blocks.append(Suspects(report.suspects))
    blocks += [
        Heading("How far to trust these scores", report.trust.level),
        Verdict(report.trust, findings=True),
        Table(report.trust.rows, headless=True),
    ]
    if report.spot_checks:
        retrained = "" if all(check.whole for check in report.spot_checks) else " the last layer alone"
        blocks.append(Heading(f"Checked by retraining{retrained}"))
        blocks.append(SpotChecks(_spot_check_table(report), pictures[SPOT_CHECK_TAG]))
    return Section(INFLUENCE_TITLE, blocks)


def summary(report: InfluenceReport) -> str:
    """Return what the scores are, from how many samples, and how far to trust them, in Markdown."""
    rows = [("what", "how much"), *((name, text.replace("|", "\\|")) for name, text in report.trust.rows)]
    verdict_in_words = f"**How far to trust them: {report.trust.level}.** {report.trust.sentence}."
    paragraphs = [meaning(report.influence.unit), verdict_in_words]
    if report.suspects:
        names = ", ".join(f"#{suspect.view.id}" for suspect in report.suspects[:8])
        paragraphs.append(f"**Look first** at the training samples with the largest self-influence: {names}.")
    return "\n\n".join([*paragraphs, as_markdown(rows)])


def ranked_lists(influence: Influence, query: int, top: int, kind: Problem | None) -> list[RankedList]:
    """Return a query's helpful, harmful and, for classes, surprisingly helpful training samples."""
    scores = influence.scores[query]
    lists = [_best(scores, "Helpful", top), _best(-scores, "Harmful", top)]
    if kind in ("classes", "binary") and influence.train_targets.numel() == len(scores):
        same_class = influence.train_targets.reshape(-1) == influence.query_targets[query].reshape(-1)
        lists.append(_best(scores.masked_fill(same_class, 0.0), "Surprisingly helpful", top))
    return lists


def _best(scores: Tensor, heading: str, top: int) -> RankedList:
    """Return the `top` largest of the positive scores; a harmful list comes in with its sign turned."""
    best = scores.topk(min(top, len(scores)))
    positive = best.values > 0
    values = best.values[positive] if heading != "Harmful" else -best.values[positive]
    return RankedList(heading, best.indices[positive].tolist(), values.tolist())


def _card(
    query: SampleView, loss: float, lists: Sequence[RankedList], views: Mapping[int, SampleView], display: Display
) -> QueryCard:
    table_columns = columns_of(query.value)

    def scored(column: int, score: float) -> ScoredSample:
        return ScoredSample(views[column], score, sample_html(views[column].value, display, table_columns))

    influence_lists = [
        InfluenceList(
            ranked.heading,
            LIST_MEANINGS[ranked.heading],
            [scored(column, score) for column, score in zip(ranked.columns, ranked.scores, strict=True)],
        )
        for ranked in lists
    ]
    return QueryCard(query, loss, sample_html(query.value, display, table_columns), influence_lists)


def draw_card(card: QueryCard, display: Display) -> Pixels:
    """Draw a query beside the training samples of its lists, `(height, width, 3)`, 0 to 255."""
    rows = [
        (f"{heading}: {about}", [(sample.view, _caption(sample)) for sample in samples])
        for heading, about, samples in card.lists
    ]
    label, *answer = verdict(card.view).split("   ")
    answer = [f"{WRONG if card.view.wrong else ''}{line}" for line in answer]
    note = "\n".join((f"query #{shortened_name(card.view.id)}", label, *answer, f"loss {card.loss:.3g}"))
    return gallery(card.view, note, rows, display)


def _caption(sample: ScoredSample) -> str:
    view = sample.view
    differs = f"\n{WRONG}predicted {view.prediction}" if view.wrong else ""
    return f"#{shortened_name(view.id)}\nlabel {view.label}\n{sample.score:+.2e}{differs}"


def draw_suspects(report: InfluenceReport) -> Pixels:
    """Draw the training samples to look at first, `(height, width, 3)`, 0 to 255."""
    count, scored = len(report.suspects), report.n_self_influence
    title = f"look at these first: the {count} of {scored:,} training samples with the largest self-influence"
    return suspects_sheet(report.suspects, title, report.display)


def _spot_check_table(report: InfluenceReport) -> list[tuple[str, str, str, str]]:
    name = report.display.id
    heading = ("query", "without sample", "predicted rise", "actual rise")
    return [heading] + [
        (f"#{name(c.query)}", f"#{name(c.train_index)}", f"{c.predicted:+.2e}", f"{c.actual:+.2e}")
        for c in report.spot_checks
    ]


def _duplicates(
    influence: Influence, queries: Sequence[SampleView], duplicates: Mapping[int, Sequence[int]]
) -> list[Duplicate]:
    columns = {int(index): column for column, index in enumerate(influence.train_ids)}

    def duplicate(query: int, index: int) -> Duplicate:
        if index not in columns:
            return Duplicate(queries[query].id, index, math.nan)
        column = columns[index]
        contradicts = not torch.equal(influence.train_targets[column], influence.query_targets[query])
        return Duplicate(queries[query].id, index, float(influence.scores[query, column]), contradicts)

    return [duplicate(query, int(index)) for query, indices in duplicates.items() for index in indices]


def _influence_rows(
    influence: Influence, queries: Sequence[SampleView], display: Display, kind: Problem | None
) -> list[InfluenceRow]:
    rows = []
    for row, query in enumerate(queries):
        loss = float(influence.query_losses[row])
        for heading, columns, scores in ranked_lists(influence, row, RANKS_IN_CSV, kind):
            for rank, (column, score) in enumerate(zip(columns, scores, strict=True), start=1):
                index = int(influence.train_ids[column])
                label = target_in_words(influence.train_targets[column], kind, display)
                answer = (query.id, query.label, query.prediction, loss)
                rows.append(InfluenceRow(*answer, heading.lower(), rank, index, display.id(index), label, score))
    return rows


def _suspects(
    model: nn.Module, task: Task, self_influence: SelfInfluence, train: Samples, display: Display, count: int
) -> list[SuspectSample]:
    """Return the training samples with the largest self-influence, each with the label that the network suggests."""
    first = self_influence.first(count)
    ids = self_influence.ids[first].tolist()
    views = view_by_index(model, task, train, ids, display)
    table_columns = columns_of(views[ids[0]].value) if ids else None
    return [
        SuspectSample(
            views[index],
            float(self_influence.chance[position]),
            float(self_influence.scores[position]),
            sample_html(views[index].value, display, table_columns),
        )
        for index, position in zip(ids, first.tolist(), strict=True)
    ]


def _suspect_rows(self_influence: SelfInfluence, kind: Problem | None, display: Display) -> list[SuspectRow]:
    """Return the training samples by falling self-influence, at most 100,000."""
    first = self_influence.first(SUSPECTS_IN_CSV)
    labels = _in_words(self_influence.targets[first], lambda target: target_in_words(target, kind, display))
    suggested = self_influence.suggested
    suggestions = [""] * len(first) if suggested is None else _in_words(suggested[first], display.label)
    indices = self_influence.ids[first].tolist()
    quantities = (self_influence.chance, self_influence.scores, self_influence.losses)
    numbers = (values[first].tolist() for values in quantities)
    return [
        SuspectRow(rank, index, display.id(index), *values)
        for rank, (index, *values) in enumerate(zip(indices, labels, suggestions, *numbers, strict=True), start=1)
    ]


def _in_words(targets: Tensor, word: Callable[[Tensor], str]) -> list[str]:
    """Return each target in words; equal ones are put into words once."""
    distinct, inverse = targets.unique(dim=0, return_inverse=True)
    words = [word(target) for target in distinct]
    return [words[index] for index in inverse.tolist()]
