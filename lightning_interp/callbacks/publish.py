"""What a callback has found, as data, and the one way in which it reaches loggers, the run's folder and the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_interp.callbacks.loggers import Loggers
from lightning_interp.storage.folder import Folder
from lightning_interp.views.report import Picture, Section, page, render_section

REPORT_TITLE = "What the network learned"
READING_ORDER = ("similarity", "attribution", "influence")
LOGGERS_WITH_A_FOLDER_PER_RUN = ("TensorBoardLogger", "CSVLogger")
# One time per trainer, so that all callbacks of a run write into the same folder.
_STARTED: WeakKeyDictionary[pl.Trainer, str] = WeakKeyDictionary()


class Curve(NamedTuple):
    """A number over past steps.

    Args:
        tag: where loggers show it.
        steps: optimizer steps, ascending.
        values: one for each step.
    """

    tag: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True, eq=False)
class Findings:
    """All that a callback has found by the end of training, before anything of it is drawn or written.

    Args:
        step: optimizer steps taken.
        section: the callback's part of the report.
        curves: numbers over past steps.
        pictures: logged, and written as PNG files.
        texts: where loggers show it → Markdown.
        files: name in the callback's folder → content: tables, scores.
        outdated: glob patterns of files in that folder which an earlier report may have left.
        own_report: title of a report of this section alone, `report.html` in the callback's folder; none when empty.
    """

    step: int
    section: Section
    curves: Sequence[Curve] = ()
    pictures: Sequence[Picture] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes | str] = field(default_factory=dict)
    outdated: Sequence[str] = ()
    own_report: str = ""


def publish(findings: Findings, loggers: Loggers, folder: Folder, room: str) -> None:
    """Log and write everything that a callback has found, and the report of all callbacks so far.

    Args:
        findings: what it has found.
        loggers: the trainer's, under the callback's tags.
        folder: the run's.
        room: the callback's folder in the run's (see `room_of`).
    """
    own = folder.folder(room)
    title = findings.section.title if room in READING_ORDER else f"{findings.section.title} ({room})"
    # All is drawn before anything is deleted or written, so that a drawing that fails leaves an earlier report whole.
    section = render_section(findings.section._replace(title=title))
    for picture in findings.pictures:
        _ = picture.png
    for name in (name for pattern in findings.outdated for name in own.names(pattern)):
        own.remove(name)
    for curve in findings.curves:
        loggers.history(*curve)
    for picture in findings.pictures:
        if picture.tag:
            loggers.image(picture.tag, picture.pixels, picture.step)
        own.write(f"{picture.file}.png", picture.png)
    for tag, text in findings.texts.items():
        loggers.text(tag, text, findings.step)
    for name, content in findings.files.items():
        own.write(name, content)
    if findings.own_report:
        own.write("report.html", page(findings.own_report, [section]))
    # Each callback leaves its section, so that the last one to end finds all of them.
    own.write("section.html", section)
    folder.write("report.html", page(REPORT_TITLE, _all_sections(folder)))


def _all_sections(folder: Folder) -> list[str]:
    """Return the sections of all callbacks that have written theirs: in reading order, then by number."""
    rooms = sorted(folder.folders_with("section.html"), key=_reading_position)
    return [folder.read(f"{room}/section.html").decode() for room in rooms]


def _reading_position(room: str) -> tuple[int, int, str]:
    kind, number = _split_number(room)
    rank = READING_ORDER.index(kind) if kind in READING_ORDER else len(READING_ORDER)
    return rank, number, room


def _split_number(room: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.+)-(\d+)", room)
    return (match[1], int(match[2])) if match else (room, 1)


def room_of(callback: Callback, trainer: pl.Trainer, kind: str) -> str:
    """Return the folder of a callback in the run's: `kind`, of a second callback of its class in the trainer `kind-2`.

    Its tags begin likewise (see `Loggers`), so that callbacks of one class never overwrite each other's results.
    """
    same_class = [c for c in getattr(trainer, "callbacks", []) if type(c) is type(callback)]
    index = next((i for i, c in enumerate(same_class) if c is callback), 0)
    return kind if index == 0 else f"{kind}-{index + 1}"


def run_folder(trainer: pl.Trainer) -> Folder:
    """Return the run's folder, `<trainer.log_dir>/interp`; call it on all ranks.

    A log folder that several runs share (no logger, or one without a folder per run) gets the time of the start as
    a name for the run. With `fast_dev_run` it is in memory, and nothing is written to disk.
    """
    root = trainer.log_dir or trainer.default_root_dir
    started = _STARTED.setdefault(trainer, datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f"))
    if getattr(trainer, "fast_dev_run", False):
        return Folder(f"memory://lightning_interp/{started}")
    folder = Folder(str(root)).folder("interp")
    kinds = type(trainer.loggers[0]).__mro__ if trainer.loggers else ()
    per_run = any(kind.__name__ in LOGGERS_WITH_A_FOLDER_PER_RUN for kind in kinds)
    return folder if per_run else folder.folder(_run_name(trainer) or started)


def _run_name(trainer: pl.Trainer) -> str | None:
    version = trainer.loggers[0].version if trainer.loggers else None
    return None if version is None else str(version)
