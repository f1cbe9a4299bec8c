"""How the retrainings in `tests/data/digits_mlp_adam.npz` were made: `python -m benchmarks.adam_truth FILE`.

All networks are trained at once: each weight has a leading axis of networks, and SGD and Adam, which work number by
number, train each as if it were alone. Each half subset is drawn at random and trained on from several seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

QUERIES, SUBSETS, SEEDS, FEW = 100, 50, 20, 3


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits, pixels in 0 to 1: 1,437 to train on, and the first 100 of the others as queries."""

    train_x: Tensor
    train_y: Tensor
    query_x: Tensor
    query_y: Tensor

    @classmethod
    def load(cls) -> Digits:
        x, y = load_digits(return_X_y=True)
        split = train_test_split(x / 16, y, test_size=360, random_state=0, stratify=y)
        train_x, query_x, train_y, query_y = (torch.tensor(array) for array in split)
        return cls(train_x.float(), train_y, query_x[:QUERIES].float(), query_y[:QUERIES])


@dataclass(frozen=True)
class Recipe:
    """A multilayer perceptron and how it is trained.

    Args:
        widths: of the input, the hidden layers and the output.
        activation: between the layers.
        optimizer: makes an optimizer of a list of parameters.
        cosine: whether the learning rate falls to zero along a cosine; constant when False.
        epochs: passes over the network's own training samples.
        batch: samples a step.
    """

    widths: Sequence[int] = (64, 64, 10)
    activation: Callable[[Tensor], Tensor] = torch.relu
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = lambda p: torch.optim.Adam(p, lr=1e-3)
    cosine: bool = False
    epochs: int = 40
    batch: int = 64


@dataclass(frozen=True)
class Trained:
    """Networks after training, all at once.

    Args:
        weights: of each layer `(networks, out, in)`, `(networks, out)`, in turn.
        optimizer: as it was after the last step.
        rates: learning rate of each step.
    """

    weights: list[Tensor]
    optimizer: torch.optim.Optimizer
    rates: list[float]


def forward(recipe: Recipe, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return logits `(networks, n, classes)` of inputs `(networks, n, features)`."""
    for index in range(0, len(weights), 2):
        x = x if index == 0 else recipe.activation(x)
        x = torch.baddbmm(weights[index + 1][:, None], x, weights[index].mT)
    return x


def start(recipe: Recipe, seeds: Sequence[int]) -> list[Tensor]:
    """Return weights as `nn.Linear` draws them, one network a seed."""
    weights: list[list[Tensor]] = []
    for seed in seeds:
        torch.manual_seed(seed)
        layers = [torch.nn.Linear(i, o) for i, o in zip(recipe.widths, recipe.widths[1:], strict=False)]
        weights.append([p.detach() for layer in layers for p in (layer.weight, layer.bias)])
    return [torch.stack(copies).requires_grad_() for copies in zip(*weights, strict=True)]


def train(recipe: Recipe, digits: Digits, rows: Tensor, seeds: Sequence[int]) -> Trained:
    """Train one network a row of training indices `(networks, n)`; the seed draws its weights and its batches."""
    weights = start(recipe, seeds)
    optimizer = recipe.optimizer(list(weights))
    steps = recipe.epochs * -(-rows.shape[1] // recipe.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (1 + np.cos(np.pi * t / steps)) / 2 if recipe.cosine else 1.0
    )
    draws = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    rates = []
    for _ in range(recipe.epochs):
        order = torch.stack([torch.randperm(rows.shape[1], generator=draw) for draw in draws])
        for batch_indices in rows.gather(1, order).split(recipe.batch, dim=1):
            logits = forward(recipe, weights, digits.train_x[batch_indices])
            loss = F.cross_entropy(logits.flatten(0, 1), digits.train_y[batch_indices].flatten(), reduction="sum")
            optimizer.zero_grad()
            (loss / batch_indices.shape[1]).backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    return Trained([w.detach() for w in weights], optimizer, rates)


def query_losses(recipe: Recipe, digits: Digits, weights: Sequence[Tensor]) -> Tensor:
    """Return each network's loss on each query, `(networks, queries)`."""
    logits = forward(recipe, weights, digits.query_x.expand(len(weights[0]), -1, -1))
    targets = digits.query_y.expand(len(logits), -1)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").reshape(targets.shape)


def half_subsets(n: int, count: int, seed: int) -> Tensor:
    """Return `count` random halves of n indices, `(count, n // 2)`."""
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=draw)[: n // 2].sort().values for _ in range(count)])


def retrain(recipe: Recipe, digits: Digits, halves: Tensor, seeds: int) -> Tensor:
    """Return query losses after training on each half from each seed, `(seeds, subsets, queries)`."""
    count = len(halves)
    trained = train(recipe, digits, halves.repeat(seeds, 1), [1 + i for i in range(seeds * count)])
    return query_losses(recipe, digits, trained.weights).reshape(seeds, count, -1)


def names_of(recipe: Recipe) -> list[str]:
    return [f"fc{layer}.{kind}" for layer in range(1, len(recipe.widths)) for kind in ("weight", "bias")]


def make(file: Path) -> None:
    """Retrain, and write the subsets, their losses, and one network trained on all rows with its second moments."""
    digits, recipe = Digits.load(), Recipe()
    n = len(digits.train_x)
    halves = half_subsets(n, SUBSETS, seed=0)
    trained = train(recipe, digits, torch.arange(n)[None], [0])
    losses = retrain(recipe, digits, halves, SEEDS)
    (group,) = trained.optimizer.param_groups
    arrays: dict[str, Any] = {"rate_sum": sum(trained.rates), "steps": len(trained.rates)}
    for name, parameter in zip(names_of(recipe), group["params"], strict=True):
        state = trained.optimizer.state[parameter]
        second_moment = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        arrays |= {name: parameter[0].detach().numpy(), f"{name}.v": second_moment[0].numpy()}
    arrays["masks"] = np.packbits(members(halves, n).numpy(), axis=1)
    arrays |= {"loss": losses[:FEW].mean(0).numpy(), "loss_of_20_seeds": losses.mean(0).numpy()}
    np.savez_compressed(file, **arrays)


def members(halves: Tensor, n: int) -> Tensor:
    """Return which of n samples are in each subset, `(subsets, n)`."""
    return torch.zeros(len(halves), n, dtype=torch.bool).scatter(1, halves, True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    make(Path(sys.argv[1]))
