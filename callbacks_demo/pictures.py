"""Pictures of an experiment, written as PNG files and to TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lightning_interp.views.canvas import Pixels


def write_pictures(pictures: Mapping[str, Pixels], folder: Path) -> None:
    """Write each picture as a PNG, named by the last part of its tag, and as a TensorBoard image."""
    folder.mkdir(parents=True, exist_ok=True)
    with SummaryWriter(str(folder)) as writer:
        for tag, pixels in pictures.items():
            Image.fromarray(pixels).save(folder / f"{tag.split('/')[-1]}.png", optimize=True)
            writer.add_image(tag, pixels, dataformats="HWC")
