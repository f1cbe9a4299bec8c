"""From numbers and pictures to every logger of the trainer that can show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch.loggers import Logger
from torch.utils.tensorboard import SummaryWriter

from lightning_interp.checks import clean
from lightning_interp.views.canvas import Pixels


class Loggers:
    """All loggers of a trainer behind four calls; a logger that cannot show an item is skipped.

    Scalars go to every logger; images and texts to TensorBoard, and to loggers that offer `log_image` and
    `log_text` (Weights & Biases does).

    Args:
        loggers: `trainer.loggers`.
        room: the callback's folder. Of a second callback of its class, `attribution-2`, tags that begin with
            `attribution` begin with `attribution-2` instead.
    """

    def __init__(self, loggers: Sequence[Logger], room: str = "") -> None:
        self._loggers = list(loggers)
        kind, _, number = room.rpartition("-")
        self._kind, self._number = (kind, f"-{number}") if number.isdigit() else (room, "")

    def _tag(self, name: str) -> str:
        if self._number and name.startswith(self._kind):
            name = f"{self._kind}{self._number}{name.removeprefix(self._kind)}"
        return clean(name)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers at an optimizer step."""
        for logger in self._loggers:
            logger.log_metrics({self._tag(name): float(value) for name, value in values.items()}, step=step)

    def history(self, name: str, steps: Sequence[int], values: Sequence[float]) -> None:
        """Log a whole curve at past steps; loggers that take only rising steps get it as a table."""
        for logger in self._loggers:
            if _writer(logger) or not hasattr(logger, "log_table"):
                for step, value in zip(steps, values, strict=True):
                    logger.log_metrics({self._tag(name): float(value)}, step=step)
            else:
                rows = [[step, float(value)] for step, value in zip(steps, values, strict=True)]
                logger.log_table(key=self._tag(name), columns=["step", "value"], data=rows)

    def image(self, name: str, pixels: Pixels, step: int) -> None:
        """Log an image `(H, W, 3)`, 0 to 255."""
        for logger in self._loggers:
            if writer := _writer(logger):
                writer.add_image(self._tag(name), pixels, step, dataformats="HWC")
            elif hasattr(logger, "log_image"):
                logger.log_image(key=self._tag(name), images=[pixels], step=step)

    def text(self, name: str, markdown: str, step: int) -> None:
        """Log a text in Markdown."""
        for logger in self._loggers:
            if writer := _writer(logger):
                writer.add_text(self._tag(name), markdown, step)
            elif hasattr(logger, "log_text"):
                logger.log_text(key=self._tag(name), columns=["text"], data=[[markdown]], step=step)


def _writer(logger: Logger) -> SummaryWriter | None:
    experiment = getattr(logger, "experiment", None)
    return experiment if isinstance(experiment, SummaryWriter) else None
