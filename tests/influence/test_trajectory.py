"""Damping from a training's own trajectory, against real retraining and real optimizers."""

from __future__ import annotations

import io
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from lightning_interp.influence.trajectory import Damping, Path, Trajectory

DATA = File(__file__).parents[1] / "data"
NAMES = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


class Retrained:
    """The network of `digits_mlp_adam.npz`, its curvature and its gradients, in one flat vector of parameters."""

    def __init__(self) -> None:
        held, data = np.load(DATA / "digits_mlp_adam.npz"), np.load(DATA / "digits_logistic_regression.npz")
        train_x, train_y, test_x, test_y = (torch.tensor(data[k]) for k in ("train_x", "train_y", "test_x", "test_y"))
        self.params = {name: torch.tensor(held[name]) for name in NAMES}
        self.v = {name: torch.tensor(held[f"{name}.v"]) for name in NAMES}
        self.rate_sum, self.steps = float(held["rate_sum"]), int(held["steps"])
        self.masks = np.unpackbits(held["masks"], axis=1)[:, : len(train_x)]
        self.loss = held["loss"]
        self.curvature = sum(self.ggn(x) for x in train_x.float().split(300)) / len(train_x)
        self.train = torch.cat([self.gradients(x, y) for x, y in zip(train_x.float(), train_y, strict=True)])
        self.query = torch.cat([self.gradients(x, y) for x, y in zip(test_x[:100].float(), test_y, strict=False)])

    def logits(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = torch.relu(x @ params["fc1.weight"].T + params["fc1.bias"])
        return hidden @ params["fc2.weight"].T + params["fc2.bias"]

    def jacobian(self, x: Tensor) -> Tensor:
        rows = torch.func.vmap(torch.func.jacrev(self.logits), (None, 0))(self.params, x)
        return torch.cat([rows[name].flatten(2) for name in NAMES], dim=2)

    def ggn(self, x: Tensor) -> Tensor:
        """Σ Jᵀ (diag p − p pᵀ) J."""
        p = self.logits(self.params, x).softmax(1)
        root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
        rows = (root.mT @ self.jacobian(x)).flatten(0, 1)
        return rows.T @ rows

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        p = self.logits(self.params, x[None]).softmax(1)
        return ((p - F.one_hot(y, 10))[:, None] @ self.jacobian(x[None]))[:, 0]

    def agreement(self, damping: Tensor) -> float:
        """Linear datamodeling score of the exact influence under a damping `(p,)`."""
        matrix = self.curvature.double() + torch.diag(damping.double())
        solved = torch.cholesky_solve(self.query.double().T, torch.linalg.cholesky(matrix))
        predicted = self.masks @ (self.train.double() @ solved).numpy()
        return float(np.mean([spearmanr(predicted[:, q], -self.loss[:, q])[0] for q in range(100)]))


@pytest.fixture(scope="module")
def retrained() -> Retrained:
    return Retrained()


def test_adams_trajectory_predicts_retraining(retrained: Retrained) -> None:
    paths = {
        name: Path("Adam", retrained.steps, retrained.rate_sum, divisor=v.sqrt() + 1e-8)
        for name, v in retrained.v.items()
    }
    damping = Trajectory(paths).damping()
    assert damping is not None
    found = retrained.agreement(torch.cat([damping.on(name).flatten() for name in NAMES]))
    other = retrained.agreement(0.1 * retrained.curvature.diagonal().mean() * torch.ones(4810))
    print(found, other)
    assert found >= 0.675
    assert other <= 0.5
