"""Put the README's picture together from a run of the demo: `python docs/overview.py RUN_FOLDER docs/overview.png`."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from lightning_interp.views.canvas import typeface

WIDTH, GAP, INK = 1240, 24, (20, 20, 20)


def main(run: Path, target: Path) -> None:
    """Read the pictures that the three callbacks stored, and write one."""
    maps = [
        Image.open(run / "similarity" / f"CKA_debiased-layer_by_epoch_to_{end}.png") for end in ("initial", "final")
    ]
    room = run / "attribution"
    panels = [Image.open(sorted(room.glob(f"{kind}-*"))[0]) for kind in ("GradCAM", "Saliency")]
    films = [Image.open(sorted(room.glob(f"film-{kind}-*"))[0]) for kind in ("GradCAM", "Saliency")]
    with open(run / "influence" / "influence.csv") as rows:
        queries = list(dict.fromkeys(line.split(",")[0] for line in rows.read().splitlines()[1:]))
    galleries = [Image.open(run / "influence" / f"query-{query}.png") for query in queries[:2]]
    rows = [
        ("RepresentationSimilarity: which layer moves, and which has arrived", maps),
        ("InputAttribution: where the network looks, and since when", panels),
        ("", films),
        ("DataInfluence: the training samples that made it so", galleries),
    ]
    strips = [strip(title, images) for title, images in rows]
    sheet = Image.new("RGB", (WIDTH, sum(s.height for s in strips) + GAP), "white")
    y = GAP // 2
    for band in strips:
        sheet.paste(band, (0, y))
        y += band.height
    sheet.save(target, optimize=True)


def strip(title: str, images: list[Image.Image]) -> Image.Image:
    """Put images side by side, as wide as the sheet allows, below a title."""
    room = WIDTH - GAP * (len(images) + 1)
    factor = min(1.0, room / sum(image.width for image in images))
    scaled = [image.resize((int(image.width * factor), int(image.height * factor)), Image.LANCZOS) for image in images]
    top = 40 if title else 8
    sheet = Image.new("RGB", (WIDTH, max(image.height for image in scaled) + top + 8), "white")
    ImageDraw.Draw(sheet).text((GAP, 6), title, INK, typeface(20))
    x = GAP
    for image in scaled:
        sheet.paste(image, (x, top))
        x += image.width + GAP
    return sheet


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
