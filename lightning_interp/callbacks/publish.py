"""The run's report, from the part that each callback has written."""

from __future__ import annotations

from lightning_interp.storage.folder import Folder
from lightning_interp.views import report

ROOMS = (*(f"{room}{number}" for room in ("similarity", "attribution") for number in ("", "-2", "-3")), "influence")


def write_section(folder: Folder, room: str, section: str) -> None:
    """Write a room's part of the report, and the report of all rooms that have written theirs."""
    folder.write(f"{room}/section.html", section)
    sections = [folder.read(f"{r}/section.html").decode() for r in ROOMS if folder.exists(f"{r}/section.html")]
    folder.write("report.html", report.page("What the network learned", sections))
