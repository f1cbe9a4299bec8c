"""Do token maps point at what decides? Transformers on text, and a vision transformer.

Text: windows of the Python standard library's own source, cut into tokens. In each, two words are planted at random
places, "acquire" or "release" and "reader" or "writer", which occur nowhere else; the class is which two. Small
transformers with masks and padding learn it, one that answers from a class token and one from the mean over tokens, so
that what decides is known:

- first: share of windows whose largest value is at a planted word.
- both: share whose two largest are the two planted words.
- mass: share of the map at the planted words, negative values left out.

Images: a vision transformer that answers from its class token learns the shapes of `python -m callbacks_demo shapes`;
pointing and energy are as there.

What the last block gives at tokens other than the class token has no gradient, so that Grad-CAM's layer is found before
it. Grad-CAM is the weakest here: it averages a channel's gradient over tokens, as if it meant the same in each, and
after a block of attention a token's state is no longer about that token alone. HiResCAM does not average.
"""

from __future__ import annotations

import argparse
import itertools
import sysconfig
import tempfile
import time
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from callbacks_demo.shapes import CLASSES, SIZE, Classifier, Shapes, convolution, fit
from lightning_interp.attribution import (
    LIME,
    Centre,
    Edges,
    GradCAM,
    HiResCAM,
    InputXGradient,
    IntegratedGradients,
    Saliency,
    energy_inside,
    pointing,
)
from lightning_interp.attribution.attributor import Attributor
from lightning_interp.attribution.results import Explanation

PLANTED = (("acquire", "release"), ("reader", "writer"))
LABELS = tuple(" ".join(pair) for pair in itertools.product(*PLANTED))
PAD, UNKNOWN = "<pad>", "<other>"
FIRST_WORDS = (PAD, *itertools.chain(*PLANTED), UNKNOWN)
SHORTEST, LONGEST = 16, 40
NETS = {"class token": True, "mean of tokens": False}
OF_TEXT: Mapping[str, Attributor] = {
    "saliency": Saliency(),
    "input × gradient": InputXGradient(),
    "integrated gradients": IntegratedGradients(),
    "LIME": LIME(samples=300, baseline=float(FIRST_WORDS.index(UNKNOWN))),
    "Grad-CAM": GradCAM(),
    "Grad-CAM, embedding": GradCAM("embedding"),
    "HiResCAM": HiResCAM(),
    "HiResCAM, embedding": HiResCAM("embedding"),
}
OF_IMAGES: Mapping[str, Attributor] = {
    "saliency": Saliency(),
    "input × gradient": InputXGradient(),
    "integrated gradients": IntegratedGradients(),
    "Grad-CAM": GradCAM(),
    "Grad-CAM, stem": GradCAM("stem"),
    "HiResCAM": HiResCAM(),
    "HiResCAM, stem": HiResCAM("stem"),
    "Centre": Centre(),
    "Edges": Edges(),
}

Sample = dict[str, Tensor]


class Windows(Dataset[Sample]):
    """Windows of source, two words planted in each; padded to the longest.

    Args:
        words: the source's tokens as indices of a vocabulary that starts with `FIRST_WORDS`.
        n: number of windows.
        seed: of their places, lengths and words.
    """

    def __init__(self, words: Tensor, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(SHORTEST, LONGEST + 1, (n,), generator=generator)
        starts = torch.randint(len(words) - LONGEST, (n,), generator=generator)
        self.attention_mask = torch.arange(LONGEST) < lengths[:, None]
        self.labels = torch.randint(len(LABELS), (n,), generator=generator)
        scores = torch.rand(n, LONGEST, generator=generator).masked_fill(~self.attention_mask, -1)
        self.places = scores.topk(2, dim=1).indices
        planted = torch.stack([1 + self.labels // 2, 3 + self.labels % 2], dim=1)
        ids = words[starts[:, None] + torch.arange(LONGEST)].scatter(1, self.places, planted)
        self.input_ids = ids * self.attention_mask

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return {name: getattr(self, name)[index] for name in ("input_ids", "attention_mask", "labels")}


class Source(L.LightningDataModule):
    """Windows to train on and to validate, of different files."""

    def __init__(self, train: int, validate: int, seed: int = 0, batch_size: int = 50) -> None:
        super().__init__()
        self.batch_size = batch_size
        first, rest, self.vocabulary = source()
        self.train, self.held_out = Windows(first, train, 2 * seed), Windows(rest, validate, 2 * seed + 1)

    def train_dataloader(self) -> DataLoader[Sample]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        return DataLoader(self.held_out, 250)


@cache
def source(files: int = 60, size: int = 1000) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return the tokens of the standard library's first files, of those that follow, and the vocabulary."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    texts = [list(words(path)) for path in paths]
    half = len(texts) // 2
    counts = Counter(word for text in texts[:half] for word in text if word not in FIRST_WORDS)
    vocabulary = (*FIRST_WORDS, *(word for word, _ in counts.most_common(size)))
    known = {word: place for place, word in enumerate(vocabulary) if word not in FIRST_WORDS}
    unknown = FIRST_WORDS.index(UNKNOWN)
    first, rest = (
        torch.tensor([known.get(word, unknown) for text in part for word in text])
        for part in (texts[:half], texts[half:])
    )
    return first, rest, vocabulary


def words(path: Path) -> Iterator[str]:
    """Yield a source file's names and operators."""
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in (tokenize.NAME, tokenize.OP):
                yield token.string


class TextNet(Classifier):
    """Embedding, places, two transformer blocks, the class token or the mean over tokens that count, a linear layer."""

    def __init__(self, vocabulary: int, class_token: bool, width: int = 32, depth: int = 2) -> None:
        super().__init__(len(LABELS), learning_rate=3e-3)
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.places = nn.Parameter(0.1 * torch.randn(LONGEST, width))
        self.answer = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.blocks = blocks(width, depth)
        self.head = nn.Linear(width, len(LABELS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens, counts = self.embedding(input_ids) + self.places, attention_mask.bool()
        if self.answer is not None:
            tokens = torch.cat([self.answer.expand(len(tokens), -1, -1), tokens], dim=1)
            counts = F.pad(counts, (1, 0), value=True)
        tokens = self.blocks(tokens, src_key_padding_mask=~counts)
        share = counts / counts.sum(1, keepdim=True)
        read = tokens[:, 0] if self.answer is not None else (tokens * share[..., None]).sum(1)
        logits: Tensor = self.head(read)
        return logits


class VisionTransformer(Classifier):
    """A convolutional stem to 6 × 6 tokens (Xiao et al. 2021), a class token, transformer blocks, a linear layer."""

    def __init__(self, width: int = 48, depth: int = 2) -> None:
        super().__init__(len(CLASSES), learning_rate=2e-3)
        self.stem = nn.Sequential(
            *convolution(3, width // 2, 5, stride=2),
            *convolution(width // 2, width, 3, stride=2),
            *convolution(width, width, 3, stride=2),
        )
        self.project = nn.Conv2d(width, width, 1)
        self.answer = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.1 * torch.randn(1 + (SIZE // 8) ** 2, width))
        self.blocks = blocks(width, depth)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.project(self.stem(images)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.answer.expand(len(patches), -1, -1), patches], dim=1) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


def blocks(width: int, depth: int) -> nn.TransformerEncoder:
    block = nn.TransformerEncoderLayer(
        width, nhead=4, dim_feedforward=2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, depth, enable_nested_tensor=False)


class Pointed(NamedTuple):
    """What a method's maps point at, in one network; means over windows, or over images.

    Args:
        first: share whose largest value is at a planted word, or in the box.
        both: share whose two largest are the planted words; NaN of images.
        mass: share of the map there.
        layer: that Grad-CAM took; empty where it took none.
    """

    first: float
    both: float
    mass: float
    layer: str


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, list[Pointed]]]:
    """Train, measure and print one table per network."""
    parser = argparse.ArgumentParser(prog="python -m callbacks_demo tokens", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="networks on text, of each kind")
    parser.add_argument("--windows", type=int, default=3000, help="of source to train on")
    parser.add_argument("--images", type=int, default=8000, help="to train on")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--measured", type=int, default=100, help="unseen windows, and images, that are explained")
    parser.add_argument("--folder", type=Path, help="where to keep the runs; a temporary folder when left out")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    started, worked = time.perf_counter(), time.process_time()
    found: dict[str, dict[str, list[Pointed]]] = {}
    with tempfile.TemporaryDirectory() if options.folder is None else nullcontext(options.folder) as folder:
        for kind in NETS:
            runs = [on_text(kind, seed, options, Path(folder)) for seed in range(options.seeds)]
            found[kind] = {name: [run[name] for run in runs] for name in runs[0]}
            print("\n".join(table(f"text, {kind}", found[kind])))
        images = on_images(options, Path(folder))
        found["images"] = {name: [one] for name, one in images.items()}
        print("\n".join([*table("images, class token", found["images"]), "", *remarks(found)]))
    print(f"Took {time.perf_counter() - started:.0f} s, {time.process_time() - worked:.0f} s of one core.")
    return found


def on_text(kind: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Pointed]:
    """Train a network on text and explain unseen windows."""
    L.seed_everything(seed, verbose=False)
    data = Source(options.windows, max(options.measured, 500), seed)
    net = TextNet(len(data.vocabulary), class_token=NETS[kind])
    accuracy = fit(net, data, options.epochs, folder)
    print(f"text, {kind}, seed {seed}: accuracy on unseen windows {accuracy:.1%}")
    few = next(iter(DataLoader(data.held_out, options.measured)))
    labels, mask = few.pop("labels"), few["attention_mask"]
    planted = torch.zeros_like(mask).scatter(1, data.held_out.places[: len(mask)], True)
    found = {name: pointed(method(net, few, labels), planted) for name, method in OF_TEXT.items()}
    return {**found, "chance": chance(mask.sum(1).double())}


def on_images(options: argparse.Namespace, folder: Path) -> dict[str, Pointed]:
    """Train a vision transformer on shapes and explain unseen images."""
    L.seed_everything(0, verbose=False)
    data, net = Shapes(options.images, max(options.measured, 500)), VisionTransformer()
    accuracy = fit(net, data, options.epochs, folder)
    print(f"images: accuracy on unseen images {accuracy:.1%}")
    images, labels, boxes = (part[: options.measured] for part in data.held_out)
    return {name: pointed(method(net, images, labels), boxes) for name, method in OF_IMAGES.items()}


def pointed(explanation: Explanation, there: Tensor) -> Pointed:
    """Hold maps against where the deciding tokens, `(n, tokens)`, or the boxes, `(n, H, W)`, are."""
    maps, layer = explanation.maps, explanation.layer or ""
    if there.ndim == 3:
        return Pointed(mean(pointing(maps, there)), float("nan"), mean(energy_inside(maps, there)), layer)
    two = torch.zeros_like(there).scatter(1, maps.topk(2, dim=1).indices, True)
    both = (two & there).sum(1) == 2
    line, where = maps[:, None], there[:, None]
    return Pointed(mean(pointing(line, where)), mean(both), mean(energy_inside(line, where)), layer)


def chance(lengths: Tensor) -> Pointed:
    """Return what maps have that know nothing of windows of these lengths."""
    return Pointed(mean(2 / lengths), mean(2 / (lengths * (lengths - 1))), mean(2 / lengths), "")


def mean(values: Tensor) -> float:
    return float(values.double().mean())


def table(heading: str, found: Mapping[str, Sequence[Pointed]]) -> list[str]:
    """Return the lines of a table: means over networks, with standard deviations where there are several."""
    lines = [f"\n{heading:24}{'first':>14}{'both':>14}{'mass':>14}   layer"]
    for name, networks in found.items():
        columns = torch.tensor([one[:3] for one in networks]).T
        lines.append(f"{name:24}" + "".join(f"{cell(column):>14}" for column in columns) + f"   {networks[0].layer}")
    return lines


def cell(values: Tensor) -> str:
    if values.isnan().any():
        return "–"
    return f"{values.mean():.2f} ± {values.std():.2f}" if len(values) > 1 else f"{values.mean():.2f}"


def remarks(found: Mapping[str, Mapping[str, Sequence[Pointed]]]) -> list[str]:
    """Say which methods point at what decides, and which do not."""
    text = {kind: {name: mean_first(networks) for name, networks in found[kind].items()} for kind in NETS}
    images = {name: mean_first(networks) for name, networks in found["images"].items()}
    lines = []
    for kind, first in text.items():
        shares = ", ".join(f"{name} {first[name]:.0%}" for name in OF_TEXT if "embedding" not in name)
        lines += [
            f"Text, {kind}: the largest value is at a planted word in",
            f"  {shares}; by chance in {first['chance']:.0%}.",
        ]
    shares = ", ".join(
        f"{name} {images[name]:.0%}" for name in ("saliency", "input × gradient", "Grad-CAM", "HiResCAM")
    )
    beats = "more" if images["Grad-CAM"] > images["Centre"] else "no more"
    lines += [f"Images: it is in the box in {shares}; Grad-CAM finds {beats} than Centre, {images['Centre']:.0%}."]
    return lines


def mean_first(networks: Sequence[Pointed]) -> float:
    return sum(one.first for one in networks) / len(networks)


if __name__ == "__main__":
    main()
