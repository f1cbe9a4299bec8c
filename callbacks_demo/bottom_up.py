"""Which layers converge first? The lower ones are nearer to their final state all along, but they also start nearer.

A network of nine layers is trained on 4,000 real digits from three seeds, with the callback `RepresentationSimilarity`.
From the files that the callback writes: debiased linear CKA of each layer at each epoch with its own final state (Raghu
et al. 2017 saw with SVCCA that layers converge bottom-up), in the mean over the epochs between start and end; and its
Spearman correlation with depth. Beside it, as controls:

- start: the untrained network compared with its own final state. If this falls with depth, much of the effect exists
  before the first step: an untrained lower layer passes most of its input on.
- own way: (s − s₀) / (1 − s₀), the share of the way from start to end that a layer has gone, in the mean over epochs.
- untrained: the same layer of two untrained networks of different seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from callbacks_demo.mnist import Digits
from lightning_interp import RepresentationSimilarity, compare
from lightning_interp.similarity import CKA
from lightning_interp.similarity.history import histories
from lightning_interp.storage.folder import Folder
from lightning_interp.storage.snapshots import open_store

MEASURE = CKA(debiased=True)
SEEDS = 3


class DeepCNN(L.LightningModule):
    """Eight convolutions with batch normalisation and rectifiers, two of stride 2; mean; linear layer."""

    def __init__(self, width: int = 24, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        channels = (1, *[width] * 3, *[2 * width] * 5)
        strides = (2, 1, 1, 2, 1, 1, 1, 1)
        self.blocks = nn.Sequential(*map(block, channels, channels[1:], strides))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(images).mean(dim=(2, 3)))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9)


def block(inputs: int, outputs: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Curves(NamedTuple):
    """Of one run, by layer: nearness to the end and share of its own way, means over epochs; nearness at the start."""

    layers: tuple[str, ...]
    nearness: Tensor
    own_way: Tensor
    start: Tensor


def main(arguments: Sequence[str] | None = None) -> list[Curves]:
    """Train, print a table per seed and the conclusions."""
    parser = argparse.ArgumentParser(prog="python -m callbacks_demo bottom_up", description=__doc__)
    parser.add_argument("--epochs", type=int, default=4, help="at least 2, for epochs between start and end")
    parser.add_argument("--folder", type=Path, help="where to keep the runs; a temporary folder when left out")
    options = parser.parse_args(arguments)
    if options.epochs < 2:
        parser.error(f"--epochs: expected at least 2, got {options.epochs}")

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() if options.folder is None else nullcontext(options.folder) as folder:
        runs = [train(seed, options.epochs, Path(folder) / f"seed_{seed}") for seed in range(SEEDS)]
        curves_of_runs = [curves_of(run) for run in runs]
        untrained = compare(*runs, measures=[MEASURE], epochs=0).same_layers(MEASURE.name)
    for seed, curves in enumerate(curves_of_runs):
        print("\n".join(table(seed, curves)))
    print("\n".join(remarks(curves_of_runs, {layer: sum(values) / len(values) for layer, values in untrained.items()})))
    return curves_of_runs


def train(seed: int, epochs: int, folder: Path) -> Path:
    """Train one network; return the folder of its run."""
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[RepresentationSimilarity(["blocks.?", "head"], [MEASURE], on_error="raise")],
    )
    trainer.fit(DeepCNN(), datamodule=Digits())
    print(f"seed {seed}: validation accuracy {trainer.callback_metrics['val_accuracy']:.1%}")
    return Path(trainer.log_dir or folder)


def curves_of(run: Path) -> Curves:
    """Compare the stored snapshots of a run with its last one."""
    store = open_store(Folder(str(run / "interp" / "similarity")))
    history = histories({"cka": MEASURE}, [store.read(step) for step in store.steps])["cka"]
    between = slice(1, -1)
    return Curves(
        history.to_final.rows,
        history.to_final.values[:, between].mean(1),
        history.normalised.values[:, between].mean(1),
        history.to_final.values[:, 0],
    )


def by_depth(values: Tensor) -> float:
    """Return Spearman's correlation of depth with a value per layer, over the layers that have one."""
    defined = ~values.isnan()
    return float(spearmanr(torch.arange(len(values))[defined], values[defined]).statistic)


def table(seed: int, curves: Curves) -> list[str]:
    """Return one run's lines: a heading, its layers, and the correlations with depth."""
    lines = [f"\n{f'seed {seed}':16}{'to its end':>12}{'own way':>12}{'start':>12}"]
    columns = (curves.nearness, curves.own_way, curves.start)
    for index, layer in enumerate(curves.layers):
        lines.append(f"{layer:16}" + "".join(f"{float(column[index]):12.3f}" for column in columns))
    lines.append(f"{'with depth':16}" + "".join(f"{by_depth(column):12.2f}" for column in columns))
    return lines


def remarks(curves_of_runs: Sequence[Curves], untrained: dict[str, float]) -> list[str]:
    """Return the conclusions and how to read the tables."""
    near, way, start = (
        [by_depth(column) for column in columns] for columns in list(zip(*curves_of_runs, strict=True))[1:]
    )
    shared = torch.tensor(list(untrained.values()))
    each = " ".join(f"{value:.2f}" for value in shared.tolist())
    return [
        "",
        "to its end: debiased linear CKA with the final state, mean over the epochs between; own way: the share of its",
        "way from start to end; start: the untrained layer compared with its end. with depth: Spearman's correlation.",
        f"Two untrained networks, from the first layer to the last: {each} ({by_depth(shared):.2f} with depth).",
        "",
        f"Are lower layers nearer to their end all along? {answer(near)} with depth.",
        f"But do they also start nearer? {answer(start)}. Have they gone more of their own way? {answer(way)}.",
    ]


def answer(correlations: Sequence[float]) -> str:
    """Return in words whether a value falls with depth in each run: clearly, less clearly, or not."""
    low, high = min(correlations), max(correlations)
    verdict = "Yes" if high <= -0.9 else "Less clearly so" if high <= -0.3 else "No"
    return f"{verdict}: {low:.2f} to {high:.2f}"


if __name__ == "__main__":
    main()
