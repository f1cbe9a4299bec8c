"""The exact Hessian: where it is right, and where it is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_interp import Task
from lightning_interp.influence import GaussNewton, Hessian, InfluenceFunction

DATA = Path(__file__).parents[2] / "data"


class Parabola(nn.Module):
    """(w·x + b)²: as a loss of its own convex, though its Gauss–Newton matrix is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).square()


def test_it_predicts_leave_one_out_retraining() -> None:
    held = np.load(DATA / "digits_logistic_regression.npz")
    net = nn.Linear(64, 10).double()
    weights = torch.tensor(held["weights"])
    net.load_state_dict({"weight": weights[:, :64], "bias": weights[:, 64]})
    train, query = (
        TensorDataset(torch.tensor(held[f"{part}_x"]).double(), torch.tensor(held[f"{part}_y"]))
        for part in ("train", "test")
    )
    found = InfluenceFunction(Hessian(), damping=float(held["regularisation"]))(net, train, query)
    assert pearsonr(found.scores.numpy().ravel(), held["leave_one_out"].T.ravel())[0] >= 0.994
    assert found.curvature_n == 1437


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_of_a_linear_model_it_is_the_gauss_newton_matrix(dtype: torch.dtype, near: float) -> None:
    torch.manual_seed(0)
    net = nn.Linear(12, 4).to(dtype)
    train = TensorDataset(torch.randn(40, 12, dtype=dtype), torch.arange(40) % 4)
    ours, other = (InfluenceFunction(kind, 0.01).fit(net, train) for kind in (Hessian(), GaussNewton()))
    assert torch.allclose(ours(train).scores, other(train).scores, rtol=near, atol=near / 100)
    assert torch.allclose(ours.self_influence().scores, other.self_influence().scores, rtol=near)
    assert ours.fitted.mean_eigenvalue == pytest.approx(other.fitted.mean_eigenvalue, rel=near)


@pytest.mark.parametrize("at_once", [2**22, 1])
def test_it_holds_the_curvature_of_the_model_too(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("lightning_interp.influence.curvature.hessian.ELEMENTS_AT_ONCE", at_once)
    torch.manual_seed(0)
    net = Parabola().double()
    x = torch.randn(150, 4, dtype=torch.float64)
    task = Task(loss=lambda outputs, targets: outputs[:, 0])
    found = InfluenceFunction(Hessian(), 0.01).fit(net, TensorDataset(x, torch.zeros(150)), task)
    ones = torch.cat([x, torch.ones(150, 1, dtype=torch.float64)], dim=1)
    assert torch.allclose(found.fitted.matrix, 2 * ones.T @ ones / 150)


def test_a_deep_network_is_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    train = TensorDataset(torch.randn(30, 6), torch.arange(30) % 3)
    with pytest.raises(ValueError, match=r"Hessian: expected a loss that is convex.*from -.*pass GaussNewton"):
        InfluenceFunction(Hessian(), 0.01)(net, train, train)


def test_too_many_parameters_are_named_before_anything_is_computed() -> None:
    net = nn.Linear(64, 65)
    train = TensorDataset(torch.randn(3, 64), torch.arange(3))
    with pytest.raises(ValueError, match="at most 4096 covered parameters, got 4225"):
        InfluenceFunction(Hessian(), 0.01).check(net, train)
