"""From pictures, tables and notes to one self-contained HTML file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from lightning_interp.influence.results import Influence
from lightning_interp.influence.trust import Trust, meaning, trust
from lightning_interp.views.canvas import png
from lightning_interp.views.display import SampleView
from lightning_interp.views.sample_html import QueryCard, RetrainingCheck, SuspectSample, inline

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("lightning_interp.views"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

CSV_COLUMNS = (
    "query_id",
    "query_label",
    "query_prediction",
    "query_loss",
    "list",
    "rank",
    "train_index",
    "train_id",
    "train_label",
    "score",
)

SELF_INFLUENCE_COLUMNS = (
    "rank",
    "train_index",
    "train_id",
    "label",
    "suggested_label",
    "label_probability",
    "self_influence",
    "loss",
)


def page(title: str, sections: Sequence[str]) -> str:
    """Return a whole HTML page of sections that the functions below made."""
    return _TEMPLATES.get_template("page.html.jinja").render(title=title, sections=sections)


def similarity_section(
    maps: Mapping[str, Mapping[str, bytes]], tables: Mapping[str, Sequence[Sequence[str]]], notes: Sequence[str]
) -> str:
    """Return the part on representations.

    Args:
        maps: measure → name → heat map as PNG.
        tables: measure → rows of text, a heading first.
        notes: in words.
    """
    pictures = [
        (measure, [(name, inline(png)) for name, png in drawn.items()], tables[measure])
        for measure, drawn in maps.items()
    ]
    return _TEMPLATES.get_template("similarity.html.jinja").render(maps=pictures, notes=notes)


def attribution_section(
    panels: Mapping[str, Sequence[bytes]],
    films: Mapping[str, Sequence[bytes]],
    table: Sequence[Sequence[str]],
    notes: Sequence[str],
) -> str:
    """Return the part on inputs.

    Args:
        panels: method → panels of the final network as PNG.
        films: method → films over epochs as PNG.
        table: what says whether to trust each method, as rows of text, a heading first.
        notes: in words.
    """
    groups = [(name, list(map(inline, pngs)), list(map(inline, films.get(name, ())))) for name, pngs in panels.items()]
    template = _TEMPLATES.get_template("attribution.html.jinja")
    return template.render(groups=groups, table=table, notes=notes)


def influence_section(
    influence: Influence,
    queries: Sequence[QueryCard],
    suspects: Sequence[SuspectSample] = (),
    trusted: Trust | None = None,
    checked: RetrainingCheck | None = None,
) -> str:
    """Return the part on training samples.

    Args:
        influence: the scores.
        queries: each with its lists.
        suspects: training samples to look at first.
        trusted: how far to trust the scores; by what the record says when None.
        checked: predicted beside actual, where retraining has checked some.
    """
    return _TEMPLATES.get_template("influence.html.jinja").render(
        meaning=meaning(influence.unit),
        queries=queries,
        suspects=suspects,
        trusted=trusted or trust(influence),
        checked=checked,
        scatter="" if checked is None else inline(png(checked.picture)),
    )


def self_influence_csv(rows: Sequence[Sequence[Any]]) -> str:
    """Return self-influence as CSV.

    Args:
        rows: one value for each of `SELF_INFLUENCE_COLUMNS`; numbers that are not known are left empty.
    """
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(SELF_INFLUENCE_COLUMNS)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"


def influence_csv(rows: Sequence[tuple[SampleView, float, str, int, int, SampleView, float]]) -> str:
    """Return a table of scores as CSV.

    Args:
        rows: (query, its loss, list, rank, training index, training sample, score).
    """
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for query, loss, where, rank, index, train, score in rows:
        told = (query.id, query.label, query.prediction, f"{loss:.6g}")
        writer.writerow((*told, where, rank, index, train.id, train.label, f"{score:.6g}"))
    return buffer.getvalue()
