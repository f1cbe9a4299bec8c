"""A report as data: sections made of blocks, and the one self-contained HTML page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jinja2

from lightning_interp.influence.trust import Trust
from lightning_interp.views.canvas import Pixels, inline, png
from lightning_interp.views.sample_html import QueryCard, SuspectSample

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("lightning_interp.views"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as its data, drawn once, when its pixels are first needed.

    Args:
        tag: where loggers show it; empty for a picture that is only written and reported.
        file: its file's name in the callback's folder, without the ending.
        step: optimizer steps taken at the moment that it shows.
        data: what is drawn.
        draw: data → pixels `(height, width, 3)`, 0 to 255.
    """

    tag: str
    file: str
    step: int
    data: Any
    draw: Callable[[Any], Pixels]

    @cached_property
    def pixels(self) -> Pixels:
        """The drawing, `(height, width, 3)`, 0 to 255."""
        return self.draw(self.data)

    @cached_property
    def png(self) -> bytes:
        """The drawing as a PNG file."""
        return png(self.pixels)

    @property
    def address(self) -> str:
        """An address for HTML that holds the whole picture."""
        return inline(self.png)


class Paragraph(NamedTuple):
    """A paragraph of text."""

    text: str
    kind: str = "paragraph"


class Heading(NamedTuple):
    """A heading within a section; `verdict` is the level of one, which is added in its colour, or empty."""

    text: str
    verdict: str = ""
    kind: str = "heading"


class Table(NamedTuple):
    """Rows of text, the heading first; with `headless` there is none, and the first column names the rows."""

    rows: Sequence[Sequence[str]]
    headless: bool = False
    kind: str = "table"


class Pictures(NamedTuple):
    """Pictures side by side: (what each shows in words, the picture); `layout` is "map", "panel" or "film"."""

    pictures: Sequence[tuple[str, Picture]]
    layout: str
    kind: str = "pictures"


class Fold(NamedTuple):
    """Blocks that are hidden until a reader opens them."""

    summary: str
    blocks: Sequence[Any]
    kind: str = "fold"


class Verdict(NamedTuple):
    """How far to trust influence scores, in a sentence, or with every finding behind it when `findings`."""

    trust: Trust
    findings: bool = False
    kind: str = "verdict"


class Queries(NamedTuple):
    """Queries of influence, each with its lists of training samples."""

    cards: Sequence[QueryCard]
    kind: str = "queries"


class Suspects(NamedTuple):
    """The training samples with the largest self-influence."""

    samples: Sequence[SuspectSample]
    kind: str = "suspects"


class SpotChecks(NamedTuple):
    """Predicted beside actual changes of loss: rows of text, the heading first, and the scatter."""

    rows: Sequence[Sequence[str]]
    scatter: Picture
    kind: str = "spot_checks"


Block = Paragraph | Heading | Table | Pictures | Fold | Verdict | Queries | Suspects | SpotChecks


class Section(NamedTuple):
    """One callback's part of the report."""

    title: str
    blocks: Sequence[Block]


def render_section(section: Section) -> str:
    """Return a section as HTML."""
    macros = _TEMPLATES.get_template("report.html.jinja").make_module({"title": "", "sections": ()})
    return str(macros.section(section))  # type: ignore[attr-defined]


def page(title: str, sections: Sequence[str]) -> str:
    """Return a whole HTML page of sections that `render_section` made."""
    return _TEMPLATES.get_template("report.html.jinja").render(title=title, sections=sections)
