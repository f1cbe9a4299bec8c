"""A network and images for the benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1, self.relu1 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(outputs), nn.ReLU()
        narrow = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if inputs == outputs else narrow

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        shown: Tensor = self.relu2(y + self.shortcut(x))
        return shown


class ResNet20(nn.Module):
    """Nine residual blocks at 32 × 32, 16 × 16 and 8 × 8; `LAYERS` are its 12 layers, 16,384 to 10 features wide."""

    LAYERS = ("stem", *(f"blocks.{i}" for i in range(9)), "pool", "head")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        shapes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.blocks = nn.Sequential(*(Block(*shape) for shape in shapes))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.blocks(self.stem(x))).flatten(1))
        return logits


class ResNet18(nn.Module):
    """Eight residual blocks behind an ImageNet stem (7 × 7 / 2 and max pooling), or a plain 3 × 3 one for small images.

    Every ReLU is a module of its own.
    """

    def __init__(self, classes: int = 10, small: bool = False) -> None:
        super().__init__()
        first = nn.Conv2d(3, 64, 3, 1, 1, bias=False) if small else nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(64), nn.ReLU(), pool)
        shapes = [(64, 64, 1)] * 2 + [s for c in (64, 128, 256) for s in ((c, 2 * c, 2), (2 * c, 2 * c, 1))]
        self.blocks = nn.Sequential(*(Block(*shape) for shape in shapes))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.blocks(self.stem(x))).flatten(1))
        return logits


def digits(n: int) -> tuple[Tensor, Tensor]:
    """Return `n` real digits as images `(n, 3, 32, 32)` in [0, 1], and their labels."""
    dataset = load_digits()
    images = torch.tensor(dataset.images[:n], dtype=torch.float32)[:, None] / 16
    return F.interpolate(images, (32, 32), mode="bilinear").repeat(1, 3, 1, 1), torch.tensor(dataset.target[:n])


def trained(seed: int = 0, epochs: int = 1) -> ResNet20:
    """Return the network after some training on the digits, in eval mode."""
    torch.manual_seed(seed)
    net, (images, labels) = ResNet20(), digits(1797)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    return net.eval()
