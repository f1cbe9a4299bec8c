"""Which measure finds the layer of the same position in another network? The sanity check of Kornblith et al. 2019.

Networks of one architecture are trained from several random initialisations on scikit-learn's 8 × 8 digits. For each
layer of one network, which layer of another one is the most similar? A good measure answers: the one at
the same position. The share of right answers, over all layers and all
ordered pairs of networks, is the measure's accuracy (section 6.1 of "Similarity of Neural Network Representations
Revisited").

The network is plain, as the paper's: eight convolutions with batch normalisation and rectifiers that grow wider where
they are strided, then the mean over positions and a linear layer, which is left out of the comparison.

The held-out digits are read in two ways. "Flattened", the headline, has one feature per channel and position, as in the
paper: 512 to 2,048 features of 512 digits, so that plain CCA and PWCCA are not defined for most layers, and a layer for
which a measure is not defined counts as not found. "Pooled" has one feature per channel, 32 to 128: fair to CCA.

Two things to know before citing the numbers. What CCA finds in pooled features depends on the layers' widths: where
they differ, it takes wide layers for similar ones; where all are equally wide and samples are many, plain CCA finds
nearly as many layers as CKA, see `--widths 64 64 64`. And dropout, weight decay and small batches were chosen so that
the networks come out alike on so few images: in trials without dropout, in batches of 64, linear CKA found 50 to 65%.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_interp import RepresentationSimilarity
from lightning_interp.similarity import CCA, CKA, PWCCA, SVCCA, Measure, Procrustes, RBFKernel, matrix, prepare
from lightning_interp.similarity.representation import Representation
from lightning_interp.storage.folder import Folder
from lightning_interp.storage.snapshots import open_store

HELD_OUT = 512
Loader = DataLoader[tuple[Tensor, ...]]


class Row(NamedTuple):
    """A row of the table: a measure and the paper's number.

    Args:
        name: of the measure in words.
        measure: the measure.
        paper: its accuracy in percent on CIFAR-10 in the paper's table 2; None where the paper has none.
    """

    name: str
    measure: Measure
    paper: float | None = None


CCA_KINDS = (
    Row("CCA, mean ρ", CCA(), 1.4),
    Row("CCA, mean ρ²", CCA("mean_squared")),
    Row("SVCCA 0.99, mean ρ", SVCCA(), 9.9),
    Row("SVCCA 0.99, mean ρ²", SVCCA(summary="mean_squared"), 15.1),
    Row("PWCCA", PWCCA(), 11.1),
)
LINEAR_CKA = Row("CKA, linear", CKA(), 99.3)
ROWS = (
    *CCA_KINDS,
    LINEAR_CKA,
    Row("CKA, linear, debiased", CKA(debiased=True)),
    Row("CKA, RBF 0.2", CKA(RBFKernel(0.2)), 80.6),
    Row("CKA, RBF 0.4", CKA(RBFKernel(0.4)), 99.1),
    Row("CKA, RBF 0.8", CKA(RBFKernel(0.8)), 99.3),
    Row("Procrustes", Procrustes()),
)


class Score(NamedTuple):
    """How often a measure finds the layer of the same position.

    Args:
        accuracy: share of layers found, over all ordered pairs of networks.
        spread: standard deviation over networks of the accuracy of the pairs that a network takes part in.
        undefined: share of the compared layers for which the measure is not defined.
    """

    accuracy: float
    spread: float
    undefined: float


class TinyDigits(L.LightningDataModule):
    """scikit-learn's digits, 1,285 to train on and 512 held out; images `(1, 8, 8)` in [0, 1]."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held_out, training = order[:HELD_OUT], order[HELD_OUT:]
        targets = torch.tensor(labels)
        self.train = TensorDataset(images[training], targets[training])
        self.val = TensorDataset(images[held_out], targets[held_out])

    def train_dataloader(self) -> Loader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> Loader:
        return DataLoader(self.val, HELD_OUT)


class PlainNet(L.LightningModule):
    """Eight convolutions, one after the other, in three stages at 8 × 8, 4 × 4 and 2 × 2 positions."""

    def __init__(self, widths: Sequence[int], learning_rate: float = 0.025, dropout: float = 0.2) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        first, second, third = widths
        self.blocks = nn.Sequential(
            block(1, first, dropout),
            block(first, first, dropout),
            block(first, second, dropout, stride=2),
            block(second, second, dropout),
            block(second, second, dropout),
            block(second, third, dropout, stride=2),
            block(third, third, dropout),
            block(third, third, dropout, size=1),
        )
        self.head = nn.Linear(third, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(images).mean(dim=(2, 3)))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.SGD(
            self.parameters(), self.learning_rate, momentum=0.9, weight_decay=0.01, nesterov=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def block(inputs: int, outputs: int, dropout: float, stride: int = 1, size: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout(dropout))


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Score]]:
    """Train the networks, compare all pairs by all measures, print the table and return its numbers."""
    parser = argparse.ArgumentParser(prog="python -m callbacks_demo correspondence", description=__doc__)
    parser.add_argument("--networks", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--widths", type=int, nargs=3, default=[32, 64, 128], help="channels of the three stages")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; else they go when the table is printed")
    options = parser.parse_args(arguments)
    if options.networks < 2:
        parser.error("--networks: expected at least 2")

    torch.set_num_threads(1)
    started = time.perf_counter()
    with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as folder:
        trainers = [train(seed, options.epochs, options.widths, Path(folder)) for seed in range(options.networks)]
        trained = time.perf_counter()
        flattened = [layers_of(trainer) for trainer in trainers]
    pooled = [[pool(*pair) for pair in zip(layers, channels(options.widths), strict=True)] for layers in flattened]
    scores = {row.name: [score(row.measure, flattened), score(row.measure, pooled)] for row in ROWS}
    accuracies = [float(trainer.callback_metrics["val_accuracy"]) for trainer in trainers]
    print("\n".join([*table(scores), "", *remarks(scores, accuracies)]))
    print(f"Took {trained - started:.0f} s to train and {time.perf_counter() - trained:.0f} s to compare.")
    return scores


def train(seed: int, epochs: int, widths: Sequence[int], folder: Path) -> L.Trainer:
    """Train one network; the callback stores the activations of its blocks on the held-out digits at the end."""
    L.seed_everything(seed, verbose=False)
    record = RepresentationSimilarity(
        layers=["blocks.?"],
        measures=[CKA()],
        samples=HELD_OUT,
        every_n_epochs=epochs,
        store="activations",
        on_error="raise",
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[record],
        log_every_n_steps=10,
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(PlainNet(widths), datamodule=TinyDigits())
    return trainer


def layers_of(trainer: L.Trainer) -> list[Representation]:
    """Read the final activations of a run's layers from disk."""
    store = open_store(Folder(str(trainer.log_dir)).folder("interp/similarity"))
    return list(store.read(store.steps[-1]).layers.values())


def channels(widths: Sequence[int]) -> list[int]:
    first, second, third = widths
    return [first] * 2 + [second] * 3 + [third] * 3


def pool(layer: Representation, channels: int) -> Representation:
    """Return a flattened layer's mean over positions, one feature per channel."""
    assert layer.features is not None
    return prepare(layer.features.unflatten(1, (channels, -1)).mean(2))


def score(measure: Measure, networks: Sequence[Sequence[Representation]]) -> Score:
    """Compare all pairs of networks, layer by layer, and count the layers found."""
    pairs = list(itertools.combinations(range(len(networks)), 2))
    return tally({(a, b): matrix(measure, networks[a], networks[b]) for a, b in pairs})


def tally(tables: dict[tuple[int, int], Tensor]) -> Score:
    """Count the layers found in tables of similarities, layers of network a × layers of network b, by (a, b)."""
    shares = {
        pair: torch.cat([finds_its_counterpart(values), finds_its_counterpart(values.T)]).double().mean()
        for pair, values in tables.items()
    }
    networks = sorted({network for pair in tables for network in pair})
    of_networks = [torch.stack([share for pair, share in shares.items() if n in pair]).mean() for n in networks]
    accuracy = torch.stack(list(shares.values())).mean()
    undefined = torch.stack([values.diagonal().isnan() for values in tables.values()]).double().mean()
    return Score(float(accuracy), float(torch.stack(of_networks).std()), float(undefined))


def finds_its_counterpart(values: Tensor) -> Tensor:
    """Return for each row whether its most similar column is at the same position; False where that is undefined."""
    best = values.nan_to_num(nan=-torch.inf).argmax(1)
    return (best == torch.arange(len(values))) & ~values.diagonal().isnan()


def table(scores: dict[str, list[Score]]) -> list[str]:
    """Return the lines of the table, one row per measure, in percent."""
    lines = [f"{'layers found, %':24}{'flattened':>16}{'pooled':>16}{'paper (CIFAR-10)':>20}"]
    for row in ROWS:
        flattened, pooled = map(cell, scores[row.name])
        paper = "–" if row.paper is None else f"{row.paper:.1f}"
        lines.append(f"{row.name:24}{flattened:>16}{pooled:>16}{paper:>20}")
    return lines


def cell(score: Score) -> str:
    mark = "*" if score.undefined else " "
    return f"{100 * score.accuracy:.1f} ± {100 * score.spread:.1f}{mark}"


def remarks(scores: dict[str, list[Score]], accuracies: Sequence[float]) -> list[str]:
    """Return the conclusions and how to read the table."""
    lines = [
        "Share of layers whose most similar layer in another network is that of the same position, over all ordered",
        "pairs of networks; ± standard deviation over networks. Flattened: a feature per channel and position, as in",
        "the paper. Pooled: a feature per channel.",
    ]
    if gaps := [f"{name} for {flat.undefined:.0%}" for name, (flat, _) in scores.items() if flat.undefined]:
        lines += ["* Not defined where a layer has as many directions as there are samples, which counts as not found:"]
        lines += [f"  {', '.join(gaps)} of the layers."]
    for column, reading in enumerate(("flattened", "pooled")):
        best = max(CCA_KINDS, key=lambda row: scores[row.name][column].accuracy)
        ours, theirs = scores[LINEAR_CKA.name][column].accuracy, scores[best.name][column].accuracy
        lines.append(
            f"{reading.capitalize()}: linear CKA finds {ours:.1%}, the best kind of CCA ({best.name}) {theirs:.1%}."
        )
    mean = sum(accuracies) / len(accuracies)
    lines.append(f"{len(accuracies)} networks, mean validation accuracy {mean:.1%}.")
    return lines


if __name__ == "__main__":
    main()
