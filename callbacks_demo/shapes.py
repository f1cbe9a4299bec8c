"""Do the maps point at the object? Shapes whose place is known, in clutter.

A convolutional network with global average pooling learns to tell discs, squares, triangles, crosses and rings apart:
one of random place, size, angle and colour in an image of 48 × 48, on an uneven, noisy background, among strokes and
dots that mean nothing. For unseen images, maps of the true class's logit are held against the shape's box:

- error 0.2: share of images where the box around the largest connected part above 0.2 of the map's maximum overlaps
  the true one by no more than half (Zhou et al. 2016); best error: at the threshold that suits the method best.
- pointing: share of maps whose largest value lies in the box (Zhang et al. 2018).
- energy: share of the map inside the box; a box has about a sixth of the image.
- kept: rank correlation of a map, sign taken off, with that of the network whose last layer is drawn anew (Adebayo et
  al. 2018). What it answers is then chance, and a map that explains answers should be another one.

Two controls need no network: Centre, a bump in the middle, and Edges, the image's own edges. A method that does not
beat them has not been shown to look at the network.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_interp import InputAttribution
from lightning_interp.attribution import (
    CAM,
    BestLocalizationError,
    Centre,
    DeconvNet,
    Edges,
    EnergyInside,
    GradCAM,
    GradCAMPlusPlus,
    GuidedBackprop,
    InputXGradient,
    LocalizationError,
    PointingGame,
    Saliency,
    SmoothGrad,
    sanity_similarity,
)
from lightning_interp.attribution.attributor import Attributor
from lightning_interp.data.task import Task
from lightning_interp.views.canvas import render

CLASSES = ("disc", "square", "triangle", "cross", "ring")
SIZE = 48
SMALLEST, LARGEST = 8.0, 12.0  # radius of the circle around a shape, in pixels
CLUTTER = 5
AT_A_TIME = 100  # images drawn at once: more do not fit into the processor's cache

SEEDS = 3
METHODS: Mapping[str, Attributor] = {
    "CAM": CAM(),
    "Grad-CAM": GradCAM(),
    "Grad-CAM++": GradCAMPlusPlus(),
    "saliency": Saliency(),
    "input × gradient": InputXGradient(),
    "SmoothGrad": SmoothGrad(),
    "guided backprop": GuidedBackprop(),
    "DeconvNet": DeconvNet(),
    "Centre": Centre(),
    "Edges": Edges(),
}

Loader = DataLoader[tuple[Tensor, ...]]


class Found(NamedTuple):
    """What a method's maps find, in one network; means over images.

    Args:
        error: localisation error at a threshold of 0.2.
        best: at the best threshold.
        threshold: the best one.
        pointing: share of maps whose largest value lies in the box.
        energy: share of the map inside the box.
        kept: rank correlation with the map after the last layer was drawn anew; over the images that have one.
    """

    error: float
    best: float
    threshold: float
    pointing: float
    energy: float
    kept: float


class Drawn(NamedTuple):
    """Images with what is in them.

    Args:
        images: `(n, 3, 48, 48)` in [0, 1].
        labels: class of each, `(n,)`.
        boxes: which pixels lie in the smallest box around the shape, `(n, 48, 48)`.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor


def draw(n: int, seed: int) -> Drawn:
    """Return n images of shapes, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    parts = [draw_some(min(AT_A_TIME, n - start), generator) for start in range(0, n, AT_A_TIME)]
    return Drawn(*map(torch.cat, zip(*parts, strict=True)))


def draw_some(n: int, generator: torch.Generator) -> Drawn:
    """Return n images of shapes: background, clutter, a shape, noise, one above the other."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    labels = torch.randint(len(CLASSES), (n,), generator=generator)
    images = 0.5 + F.interpolate(uniform(-0.2, 0.2, 3, 4, 4), SIZE, mode="bicubic", align_corners=False)
    for _ in range(CLUTTER):
        length = uniform(0, 4, 1, 1)
        across, along = local(uniform(0, SIZE, 2), uniform(0, 3.15))
        beyond = (along.abs() - length).relu()
        images = paint(images, uniform(0.6, 1.8, 1, 1) - (across.square() + beyond.square()).sqrt(), uniform(0, 1, 3))
    radius = uniform(SMALLEST, LARGEST)
    centre = radius[:, None] + uniform(0, 1, 2) * (SIZE - 2 * radius[:, None])
    inside = depth(labels, *local(centre, uniform(0, 6.3)), radius[:, None, None])
    behind = (images * (inside > 0)[:, None]).sum((2, 3)) / (inside > 0).sum((1, 2))[:, None]
    way = F.normalize(uniform(-1, 1, 3), dim=1) * uniform(0.4, 0.8, 1)
    images = paint(images, inside, behind + way)
    images = images + 0.04 * torch.randn(images.shape, generator=generator)
    return Drawn(images.clamp(0, 1), labels, box(inside > 0))


def local(centre: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return each pixel's coordinates around a centre, turned by an angle; two of `(n, 48, 48)`."""
    place = torch.arange(SIZE) + 0.5
    x = place[None, None, :] - centre[:, 0, None, None]
    y = place[None, :, None] - centre[:, 1, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return cos * x + sin * y, cos * y - sin * x


def depth(labels: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Return how deep each pixel lies in the shape of its image's class, in pixels; negative outside."""
    far, wide, high = (x.square() + y.square()).sqrt(), x.abs(), y.abs()
    sides = torch.stack([y, 0.866 * x - y / 2, -0.866 * x - y / 2])
    bar = torch.minimum(0.3 * radius - wide, radius - high)
    other = torch.minimum(0.3 * radius - high, radius - wide)
    of_class = torch.stack(
        [
            0.85 * radius - far,
            0.75 * radius - torch.maximum(wide, high),
            0.55 * radius - sides.amax(0),
            torch.maximum(bar, other),
            0.2 * radius - (far - 0.75 * radius).abs(),
        ]
    )
    return of_class[labels, torch.arange(len(labels))]


def paint(images: Tensor, inside: Tensor, colour: Tensor) -> Tensor:
    """Return images with a colour where `inside`, a depth in pixels, is positive; edges are smooth."""
    cover = (inside + 0.5).clamp(0, 1)[:, None]
    return images + cover * (colour[:, :, None, None] - images)


def box(inside: Tensor) -> Tensor:
    """Return which pixels lie in the smallest box around the true ones, `(n, 48, 48)`."""
    rows, columns = (inside.any(dim) for dim in (2, 1))
    across, down = ((line.cumsum(1) > 0) & (line.flip(1).cumsum(1).flip(1) > 0) for line in (columns.int(), rows.int()))
    return down[:, :, None] & across[:, None, :]


class Shapes(L.LightningDataModule):
    """Images of shapes: some to train on, some to validate."""

    def __init__(self, train: int, validate: int, seed: int = 0, batch_size: int = 50) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train, self.held_out = draw(train, 2 * seed), draw(validate, 2 * seed + 1)

    def train_dataloader(self) -> Loader:
        return DataLoader(TensorDataset(*self.train[:2]), self.batch_size, shuffle=True)

    def val_dataloader(self) -> Loader:
        return DataLoader(TensorDataset(*self.held_out[:2]), 250)


class Classifier(L.LightningModule):
    """What the experiments' networks have in common: how they learn. Each adds its own `forward`."""

    def __init__(self, classes: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return Task().losses(self, batch)[2].mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits, labels, _ = Task().losses(self, batch)
        self.accuracy(logits, labels)
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ShapesNet(Classifier):
    """Four convolutions with batch normalisation and rectifiers, maps of 12 × 12, their mean, a linear layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(len(CLASSES), learning_rate=1e-2)
        self.features = nn.Sequential(
            *convolution(3, width, 5, stride=2),
            *convolution(width, 2 * width, 3),
            nn.MaxPool2d(2),
            *convolution(2 * width, 4 * width, 3),
            *convolution(4 * width, 4 * width, 3),
        )
        self.head = nn.Linear(4 * width, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return logits


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def fit(
    net: L.LightningModule, data: L.LightningDataModule, epochs: int, folder: Path, *callbacks: L.Callback
) -> float:
    """Train a network; return its accuracy on what it has not seen."""
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        log_every_n_steps=10,
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, datamodule=data)
    return float(trainer.callback_metrics["val_accuracy"])


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Found]]:
    """Train from each seed, measure, print the table and what it shows, and draw a few maps."""
    parser = argparse.ArgumentParser(prog="python -m callbacks_demo shapes", description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=4000, help="to train on")
    parser.add_argument("--measured", type=int, default=250, help="unseen images that the maps are measured on")
    parser.add_argument("--picture", type=Path, help="where to draw a few maps of the first network, as PNG")
    parser.add_argument("--folder", type=Path, help="where to keep the runs; a temporary folder when left out")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    started, worked = time.perf_counter(), time.process_time()
    found: dict[str, list[Found]] = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory() if options.folder is None else nullcontext(options.folder) as folder:
        for seed in range(SEEDS):
            net, data = train(seed, options.epochs, options.images, max(options.measured, 500), Path(folder))
            drawn = Drawn(*(part[: options.measured] for part in data.held_out))
            for name, method in METHODS.items():
                found[name].append(measure(method, net, drawn))
            if options.picture and seed == 0:
                sheet(net, drawn).save(options.picture, optimize=True)
    print("\n".join([*table(found), "", *remarks(found)]))
    print(f"Took {time.perf_counter() - started:.0f} s, {time.process_time() - worked:.0f} s of one core.")
    return found


def train(seed: int, epochs: int, images: int, held_out: int, folder: Path) -> tuple[ShapesNet, Shapes]:
    """Train one network, with a film of four unseen images' maps in its log."""
    L.seed_everything(seed, verbose=False)
    net, data = ShapesNet(), Shapes(images, held_out, seed)
    film = InputAttribution([GradCAM(), Saliency()], samples=4, on_error="raise")
    accuracy = fit(net, data, epochs, folder, film)
    print(f"seed {seed}: accuracy on unseen images {accuracy:.1%}")
    return net, data


def measure(method: Attributor, net: nn.Module, drawn: Drawn) -> Found:
    """Hold a method's maps of the true classes against the boxes."""
    error, best, points, energy = LocalizationError(0.2), BestLocalizationError(), PointingGame(), EnergyInside()
    kept: list[Tensor] = []
    for images, labels, boxes in zip(*(part.split(AT_A_TIME) for part in drawn), strict=True):
        maps = method(net, images, labels).maps
        for metric in (error, best, points, energy):
            metric.update(maps, boxes)
        kept.append(sanity_similarity(method, net, images, labels))
    at_best = best.compute()
    return Found(
        float(error.compute()),
        float(at_best["error"]),
        float(at_best["threshold"]),
        float(points.compute()),
        float(energy.compute()),
        float(torch.cat(kept).nanmean()),
    )


def table(found: Mapping[str, Sequence[Found]]) -> list[str]:
    """Return the lines of the table: mean and standard deviation over networks."""
    heads = ("error 0.2", "best error", "at", "pointing", "energy", "kept")
    lines = [f"{'':18}" + "".join(f"{head:>14}" for head in heads)]
    for name, networks in found.items():
        columns = torch.tensor(networks).T
        cells = [f"{mean:.2f} ± {spread:.2f}" for mean, spread in zip(columns.mean(1), columns.std(1), strict=True)]
        lines.append(f"{name:18}" + "".join(f"{cell:>14}" for cell in cells))
    return lines


def remarks(found: Mapping[str, Sequence[Found]]) -> list[str]:
    """Answer the three questions, from means over networks."""
    mean = {name: Found(*torch.tensor(networks).mean(0).tolist()) for name, networks in found.items()}
    gradient = mean["saliency"]
    below = all(cam.error < gradient.error and cam.best < gradient.best for cam in (mean["CAM"], mean["Grad-CAM"]))
    kept = [mean[name].kept for name in ("guided backprop", "saliency", "Grad-CAM")]
    points = mean["Grad-CAM"].pointing
    said = " > ".join(f"{value:.2f}" for value in kept)
    return [
        f"Means over {len(found['CAM'])} networks ± standard deviation. Good are low errors, much pointing and",
        "energy, and little that is kept.",
        f"Do CAM and Grad-CAM localise better than saliency, at 0.2 and at best? {answer(below)}.",
        f"Does Grad-CAM's maximum lie in the box in at least 95%? {answer(points >= 0.95)}: {points:.1%}.",
        "Is more kept of guided backpropagation than of the gradient, and of that than of Grad-CAM, when the last",
        f"layer is drawn anew? {answer(kept[0] > kept[1] > kept[2])}: {said}.",
    ]


def answer(holds: bool) -> str:
    return "Yes" if holds else "No"


def sheet(net: nn.Module, drawn: Drawn, rows: int = 5) -> Image.Image:
    """Draw an image of each class beside its maps, with the true box around."""
    chosen = torch.stack([(drawn.labels == label).nonzero()[0, 0] for label in range(len(CLASSES))])[:rows]
    few = Drawn(*(part[chosen] for part in drawn))
    maps = {name: method(net, few.images, few.labels).maps for name, method in METHODS.items()}
    figure = Figure(figsize=(1.1 * (1 + len(maps)), 1.1 * len(chosen) + 0.3), dpi=100, layout="constrained")
    for row, axes in enumerate(figure.subplots(len(chosen), 1 + len(maps), squeeze=False)):
        for place, (ax, name) in enumerate(zip(axes, ("", *maps), strict=True)):
            image = few.images[row].permute(1, 2, 0)
            ax.imshow((overlay(image, maps[name][row]) if place else image).numpy())
            ax.contour(few.boxes[row].numpy(), levels=[0.5], colors="white", linewidths=0.8)
            ax.set_axis_off()
            if row == 0:
                ax.set_title(name, fontsize=8)
    return with_palette(Image.fromarray(render(figure)))


def with_palette(drawn: Image.Image) -> Image.Image:
    """Return a picture in 256 colours: its file is a third as large."""
    palette = drawn.quantize(256, Image.Quantize.MAXCOVERAGE)
    return drawn.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def overlay(image: Tensor, attribution: Tensor) -> Tensor:
    """Return a darkened grey image with what is positive of a map in colours on it; all `(H, W, 3)` in [0, 1].

    Of maps with channels the largest absolute value is shown. Colours end where 0.5% of the positions lie above.
    """
    shown = attribution.abs().amax(0) if attribution.ndim == 3 else attribution.relu()
    share = (shown / shown.flatten().quantile(0.995).clamp(min=1e-12)).clamp(0, 1)[..., None]
    colours = torch.from_numpy(colormaps["inferno"](share[..., 0].numpy())[..., :3]).float()
    grey = 0.6 * image.mean(-1, keepdim=True)
    return grey + share.sqrt() * (colours - grey)


if __name__ == "__main__":
    main()
