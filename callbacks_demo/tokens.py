"""Do token maps point at what decides? A transformer on text, and a vision transformer.

Text: windows of the Python standard library's own source, cut into tokens. In each, two words are planted at random
places, "acquire" or "release" and "reader" or "writer", which occur nowhere else; the class is which two. A small
transformer with masks and padding learns it, so that what decides is known:

- first: share of windows whose largest value is at a planted word; chance is 2 / length.
- both: share whose two largest are the two planted words.
- mass: share of the map at the planted words, negative values left out.

Images: a vision transformer that answers from its class token learns the shapes of `python -m callbacks_demo shapes`.
What is after the last block's other tokens has no gradient, so that Grad-CAM's layer is found before it. Pointing and
energy are as there.
"""

from __future__ import annotations

import argparse
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from callbacks_demo.shapes import CLASSES, SIZE, Classifier, Shapes, convolution, fit

PLANTED = (("acquire", "release"), ("reader", "writer"))
PAD, UNKNOWN = "<pad>", "<other>"
SHORTEST, LONGEST = 16, 40

Sample = dict[str, Tensor]


class Windows(Dataset[Sample]):
    """Windows of source, two words planted in each; padded to the longest.

    Args:
        words: the source's tokens as indices of a vocabulary that starts with the padding and the planted words.
        n: number of windows.
        seed: of their places, lengths and words.
    """

    def __init__(self, words: Tensor, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(SHORTEST, LONGEST + 1, (n,), generator=generator)
        starts = torch.randint(len(words) - LONGEST, (n,), generator=generator)
        self.attention_mask = torch.arange(LONGEST) < lengths[:, None]
        self.labels = torch.randint(4, (n,), generator=generator)
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
    planted = tuple(word for pair in PLANTED for word in pair)
    counts = Counter(word for text in texts[:half] for word in text if word not in planted)
    vocabulary = (PAD, *planted, UNKNOWN, *(word for word, _ in counts.most_common(size)))
    index = {word: place for place, word in enumerate(vocabulary) if word not in planted}
    first, rest = (
        torch.tensor([index.get(word, index[UNKNOWN]) for text in part for word in text])
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
    """Embedding, places, two transformer blocks, the mean over tokens that count, a linear layer."""

    def __init__(self, vocabulary: int, width: int = 32, depth: int = 2) -> None:
        super().__init__(4, learning_rate=3e-3)
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.places = nn.Parameter(0.1 * torch.randn(LONGEST, width))
        self.blocks = blocks(width, depth)
        self.head = nn.Linear(width, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.blocks(self.embedding(input_ids) + self.places, src_key_padding_mask=~attention_mask.bool())
        counted = attention_mask[..., None].to(tokens.dtype)
        logits: Tensor = self.head((tokens * counted).sum(1) / counted.sum(1))
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
