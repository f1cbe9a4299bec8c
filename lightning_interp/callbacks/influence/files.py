"""Where the influence callback's findings go: loggers, pictures, tables and the report."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save

from lightning_interp.callbacks.influence.report import InfluenceReport
from lightning_interp.callbacks.loggers import Loggers
from lightning_interp.callbacks.publish import write_section
from lightning_interp.checks import clean
from lightning_interp.influence.results import Influence
from lightning_interp.storage.folder import Folder
from lightning_interp.views import report
from lightning_interp.views.canvas import png

SOMETIMES = ("query-*.png", "look-at-first.png", "spot-check.png", "self_influence.csv")


def publish(trainer: pl.Trainer, folder: Folder, found: Influence, told: InfluenceReport) -> None:
    """Log and write everything that is told of the scores; of an earlier report nothing is left."""
    earlier = folder.folder("influence")
    for name in (name for pattern in SOMETIMES for name in earlier.names(pattern)):
        earlier.remove(name)
    board, step = Loggers(trainer.loggers), trainer.global_step
    for name, pixels in told.galleries.items():
        board.image(f"influence/query_{name}", pixels, step)
        folder.write(f"influence/query-{clean(name).replace('/', '_')}.png", png(pixels))
    for tag, picture in (("look_at_first", told.suspects_picture), ("spot_check", told.spot_picture)):
        if picture is not None:
            board.image(f"influence/{tag}", picture, step)
            folder.write(f"influence/{tag.replace('_', '-')}.png", png(picture))
    board.text("influence_notes/summary", told.summary, step)
    folder.write("influence/report.html", report.page("Training-data influence", [told.section]))
    folder.write("influence/influence.csv", report.influence_csv(told.rows))
    if told.suspect_rows:
        folder.write("influence/self_influence.csv", report.self_influence_csv(told.suspect_rows))
    scores = {"scores": found.scores.float().contiguous(), "train_index": found.train_ids}
    folder.write("influence/scores.safetensors", save(scores))
    write_section(folder, "influence", told.section)
    rank_zero_info(f"DataInfluence: the report is in {folder.file('influence/report.html')}")
