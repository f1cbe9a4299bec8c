"""Small modules and data that exercise what a training run can hold."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy


class Shapes(Dataset):
    """Noisy 8×8 squares in one of three corners; augmented with all three generators when asked."""

    def __init__(self, n: int = 24, augment: bool = False, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % 3
        self.images = torch.rand(n, 1, 8, 8, generator=generator) * 0.3
        for image, label in zip(self.images, self.labels, strict=True):
            row, column = [(0, 0), (0, 4), (4, 0)][int(label)]
            image[0, row : row + 4, column : column + 4] += 0.7
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if self.augment:
            shift = random.randint(0, 1) + int(np.random.randint(0, 2))
            image = image.roll(shift, dims=1) + 0.01 * torch.randn(1, 8, 8)
        return image, self.labels[index]


class Net(L.LightningModule):
    """Convolutions, batch normalisation, dropout, an in-place ReLU and a torchmetric; notes what it was fed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 3)
        self.accuracy = MulticlassAccuracy(3)
        self.fed: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv1(x)))
        x = F.relu(self.conv2(x)).mean(dim=(2, 3))
        return self.head(self.drop(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.fed.append(x.detach().clone())
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.accuracy(self(x), y)
        self.log("val_accuracy", self.accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loaders(workers: int = 0, augment: bool = False, n: int = 24) -> tuple[DataLoader, DataLoader]:
    train = DataLoader(Shapes(n, augment), 8, shuffle=True, num_workers=workers)
    return train, DataLoader(Shapes(12, seed=1), 6, num_workers=workers)


def trainer(folder: Any, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "max_epochs": 2,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**defaults | options)
