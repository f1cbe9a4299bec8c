"""Which damping predicts retraining? Compared on small networks and optimizers: `python -m benchmarks.damping`.

The score is the linear datamodeling score over 50 half subsets, each in the mean over 3 seeds, for one network trained
on all rows: under the exact curvature, and under EK-FAC.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.adam_truth import Digits, Recipe, Trained, forward, half_subsets, members, names_of, retrain, train
from lightning_interp.influence import EKFAC, InfluenceFunction
from lightning_interp.influence.curvature.ekfac import FittedEKFAC
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.trajectory import Path, Trajectory, rate_of


@dataclass(frozen=True)
class Exact:
    """The generalised Gauss–Newton matrix `(p, p)` of one network and its gradients `(n, p)`, in float64."""

    curvature: Tensor
    train: Tensor
    query: Tensor

    @classmethod
    def of(cls, recipe: Recipe, digits: Digits, weights: Sequence[Tensor]) -> Exact:
        first = [w[:1].double() for w in weights]

        def logits(parts: list[Tensor], x: Tensor) -> Tensor:
            return forward(recipe, parts, x[None, None])[0, 0]

        def jacobian(x: Tensor) -> Tensor:
            parts = torch.func.vmap(torch.func.jacrev(logits), (None, 0))(first, x)
            return torch.cat([part.flatten(2) for part in parts], dim=2)

        def gradients(x: Tensor, y: Tensor) -> Tensor:
            p = forward(recipe, first, x[None])[0].softmax(1)
            return ((p - F.one_hot(y, p.shape[1]))[:, None] @ jacobian(x))[:, 0]

        curvature = torch.zeros(0)
        for x in digits.train_x.double().split(300):
            p = forward(recipe, first, x[None])[0].softmax(1)
            root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
            rows = (root.mT @ jacobian(x)).flatten(0, 1)
            curvature = rows.T @ rows + (curvature if len(curvature) else 0)
        return cls(
            curvature / len(digits.train_x),
            gradients(digits.train_x.double(), digits.train_y),
            gradients(digits.query_x.double(), digits.query_y),
        )

    def scores(self, damping: Tensor | float) -> Tensor:
        """Return influence `(queries, n)` under a damping, one number or one a parameter."""
        damped = self.curvature.clone()
        damped.diagonal().add_(damping)
        return torch.cholesky_solve(self.query.T, torch.linalg.cholesky(damped)).T @ self.train.T / len(self.train)


@dataclass(frozen=True)
class Kronecker:
    """The package's EK-FAC of one network, and its exact gradients."""

    fitted: FittedEKFAC
    exact: Exact
    widths: Sequence[int]

    @classmethod
    def of(cls, recipe: Recipe, digits: Digits, weights: Sequence[Tensor], exact: Exact) -> Kronecker:
        net = nn.Sequential()
        for layer, (weight, bias) in enumerate(zip(weights[::2], weights[1::2], strict=True), 1):
            net.add_module(f"act{layer}", Elementwise(recipe.activation) if layer > 1 else nn.Identity())
            net.add_module(f"fc{layer}", nn.Linear(weight.shape[2], weight.shape[1]))
            net[-1].load_state_dict({"weight": weight[0], "bias": bias[0]})
        data = TensorDataset(digits.train_x, digits.train_y)
        fitted = InfluenceFunction(EKFAC(columns=None), damping=1.0).fit(net, data).fitted
        assert isinstance(fitted, FittedEKFAC)
        return cls(fitted, exact, recipe.widths)

    def scores(self, damping: Tensor | float) -> Tensor:
        """Return influence `(queries, n)`; a damping for each parameter enters by its diagonal in the eigenbasis.

        D'[o, i] = Σ U_B[j, o]² U_A[k, i]² D[j, k]: what is off that diagonal is dropped, as EK-FAC does to curvature.
        """
        dampings = self._split(torch.as_tensor(damping).expand(1, self.exact.train.shape[1]))
        total = torch.zeros(())
        layers = zip(dampings, self._split(self.exact.query), self._split(self.exact.train), strict=True)
        for (layer, basis), (given, asked, rows) in zip(self.fitted.bases.items(), layers, strict=True):
            outputs, inputs = basis.outputs, basis.inputs
            assert outputs is not None
            assert inputs is not None
            squeezed = outputs[0].square().T @ given[0] @ inputs[0].square()
            solved = (outputs.mT @ asked @ inputs) / (self.fitted.eigenvalues[layer] + squeezed)
            total = total + solved.flatten(1) @ (outputs.mT @ rows @ inputs).flatten(1).T
        return total / len(self.exact.train)

    def _split(self, flat: Tensor) -> list[Tensor]:
        """Return `(n, p)` as one `(n, out, in + 1)` a layer, bias last."""
        blocks, start = [], 0
        for i, o in zip(self.widths, self.widths[1:], strict=False):
            weight, bias = flat[:, start : start + o * i], flat[:, start + o * i : start + o * i + o]
            blocks.append(torch.cat([weight.reshape(-1, o, i), bias[:, :, None]], dim=2).float())
            start += o * i + o
        return blocks


class Elementwise(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def datamodeling_score(scores: Tensor, masks: Tensor, losses: Tensor) -> float:
    """Return the mean over queries of the rank correlation between a subset's summed scores and minus its loss."""
    predicted = (masks.double() @ scores.double().T).numpy()
    correlations = [spearmanr(p, -q).statistic for p, q in zip(predicted.T, losses.numpy().T, strict=True)]
    return float(np.mean(correlations))


def compare(name: str, recipe: Recipe, digits: Digits, subsets: int = 50, seeds: int = 3) -> None:
    """Print how well each damping predicts the retrainings of one recipe."""
    n = len(digits.train_x)
    halves = half_subsets(n, subsets, seed=7)
    masks, losses = members(halves, n), retrain(recipe, digits, halves, seeds).mean(0)
    trained = train(recipe, digits, torch.arange(n)[None], [0])
    trajectory = recorded(recipe, trained)
    exact = Exact.of(recipe, digits, trained.weights)
    kronecker = Kronecker.of(recipe, digits, trained.weights, exact)
    mean_eigenvalue = float(exact.curvature.diagonal().mean())
    print(f"{name}; mean loss of the halves {float(losses.mean()):.3f}; {known(trajectory.damping()).origin}")
    dampings = {f"trajectory, k = {k:g}": flat(recipe, known(trajectory.damping(k))) for k in (1.0, 2.0, 4.0)}
    plain = {key: dataclasses.replace(path, divisor=None, decoupled=False) for key, path in trajectory.paths.items()}
    dampings["trajectory without divisor"] = flat(recipe, known(Trajectory(plain).damping()))
    dampings |= {f"{share} × mean eigenvalue": share * mean_eigenvalue * torch.ones(1) for share in (0.03, 0.1, 0.3, 3)}
    for said, damping in dampings.items():
        scores = [datamodeling_score(kind.scores(damping), masks, losses) for kind in (exact, kronecker)]
        print(f"  {said:28} exact {scores[0]:.3f}  EK-FAC {scores[1]:.3f}", flush=True)


def known(damping: Damping | None) -> Damping:
    """Return a damping that has to be there."""
    if damping is None:
        raise ValueError("damping: expected a trajectory that gives one")
    return damping


def flat(recipe: Recipe, damping: Damping) -> Tensor:
    """Return a damping as one number a parameter."""
    shapes = [shape for i, o in zip(recipe.widths, recipe.widths[1:], strict=False) for shape in ((o, i), (o,))]
    parts = [torch.as_tensor(damping.on(name)) for name in names_of(recipe)]
    return torch.cat([part.expand(shape).flatten() for part, shape in zip(parts, shapes, strict=True)])


def recorded(recipe: Recipe, trained: Trained) -> Trajectory:
    """Return the trajectory of the first network, by the names of `names_of`."""
    (group,) = trained.optimizer.param_groups
    rate_sum = sum(rate_of({**group, "lr": rate}) for rate in trained.rates)
    paths = {}
    for name, stacked in zip(names_of(recipe), group["params"], strict=True):
        path = Path.of(trained.optimizer, group, stacked, len(trained.rates), rate_sum)
        first = path.divisor if path.divisor is None else path.divisor[0]
        paths[name] = dataclasses.replace(path, divisor=first)
    return Trajectory(paths)


def sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1.0)


def main() -> None:
    torch.set_num_threads(1)
    digits, deep = Digits.load(), (64, 32, 32, 10)
    compare("MLP, Adam", Recipe(), digits)
    compare("MLP, AdamW", Recipe(optimizer=adamw), digits)
    compare("MLP, SGD", Recipe(optimizer=sgd, cosine=True), digits)
    compare("tanh net of three layers, Adam", Recipe(deep, torch.tanh), digits)
    compare("tanh net of three layers, SGD", Recipe(deep, torch.tanh, sgd, cosine=True), digits)


if __name__ == "__main__":
    main()
