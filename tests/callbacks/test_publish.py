"""How findings reach a run's folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_interp.callbacks.loggers import Loggers
from lightning_interp.callbacks.publish import Findings, publish
from lightning_interp.storage.folder import Folder
from lightning_interp.views.canvas import Pixels
from lightning_interp.views.report import Paragraph, Picture, Section


def square(shade: int) -> Pixels:
    if shade < 0:
        raise ValueError("no such shade")
    return np.full((4, 4, 3), shade, np.uint8)


def findings(text: str, *shades: int) -> Findings:
    pictures = [Picture("", f"square-{shade}", 0, shade, square) for shade in shades]
    return Findings(0, Section("Squares", [Paragraph(text)]), pictures=pictures, outdated=["square-*.png"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_pictures_of_an_earlier_report_are_gone(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    publish(findings("earlier", 1, 2), Loggers([]), folder, "influence")
    publish(findings("later", 2, 3), Loggers([]), folder, "influence")
    written = contents(tmp_path)
    assert sorted(written) == [
        "influence/section.html",
        "influence/square-2.png",
        "influence/square-3.png",
        "report.html",
    ]
    assert b"later" in written["report.html"]
    assert b"earlier" not in written["report.html"]


def test_a_drawing_that_fails_leaves_the_earlier_report_whole(tmp_path: Path) -> None:
    publish(findings("earlier", 1, 2), Loggers([]), Folder(str(tmp_path)), "influence")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="no such shade"):
        publish(findings("later", 3, -1), Loggers([]), Folder(str(tmp_path)), "influence")
    assert contents(tmp_path) == before


def test_sections_stand_in_reading_order_and_by_number(tmp_path: Path) -> None:
    rooms = ["influence", "attribution-10", "attribution-2", "similarity-2", "attribution", "similarity"]
    for room in rooms:
        publish(findings(f"<b>{room}</b>"), Loggers([]), Folder(str(tmp_path)), room)
    page = (tmp_path / "report.html").read_text()
    expected = ["similarity", "similarity-2", "attribution", "attribution-2", "attribution-10", "influence"]
    places = [page.index(f"&lt;b&gt;{room}&lt;/b&gt;") for room in expected]
    assert places == sorted(places)
