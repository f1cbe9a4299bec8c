"""Logistic regression in closed form: against autograd, against the estimator, and against 1,437 retrainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_interp.influence import (
    GaussNewton,
    InfluenceFunction,
    Retrained,
    binary_factors,
    impact_by_size,
    leverage_corrected,
    multinomial_factors,
)
from lightning_interp.influence.logistic import Factors, fit_logistic_regression, inverse_curvature

DATA = Path(__file__).parents[1] / "data"
Labelled = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> dict[str, Any]:
    held = np.load(DATA / "digits_logistic_regression.npz")
    sides = {side: (with_ones(held[f"{side}_x"]), torch.tensor(held[f"{side}_y"])) for side in ("train", "test")}
    actual = torch.tensor(held["leave_one_out"]).double().T
    return {**sides, "weights": torch.tensor(held["weights"]), "decay": float(held["regularisation"]), "actual": actual}


@pytest.fixture
def small() -> tuple[Labelled, Labelled]:
    """Return 30 training samples and 4 queries of three classes, four features and a bias."""
    x, targets = torch.randn(34, 5, dtype=torch.float64), torch.arange(34) % 3
    x[:, 4] = 1
    x[:, 0] += 0.7 * targets
    return (x[:30], targets[:30]), (x[30:], targets[30:])


def with_ones(x: np.ndarray) -> Tensor:
    return torch.tensor(np.column_stack([x, np.ones(len(x))]), dtype=torch.float64)


def by_autograd(weights: Tensor, loss: Any, train: Labelled, query: Labelled, decay: float) -> Tensor:
    """(1/n) ∇ℓ_qᵀ H⁻¹ ∇ℓ_i with every derivative taken by autograd; loss(weights, x, y) of one sample."""
    n, flat = len(train[0]), weights.flatten()

    def objective(at: Tensor) -> Tensor:
        shaped = at.reshape(weights.shape)
        total = sum(loss(shaped, x, y) for x, y in zip(*train, strict=True))
        return total / n + decay / 2 * at.square().sum()

    hessian = torch.autograd.functional.hessian(objective, flat)

    def gradients(side: Labelled) -> Tensor:
        def one(x: Tensor, y: Tensor) -> Tensor:
            return torch.autograd.functional.jacobian(lambda at: loss(at.reshape(weights.shape), x, y), flat)

        return torch.stack([one(x, y) for x, y in zip(*side, strict=True)])

    return gradients(query) @ torch.linalg.solve(hessian, gradients(train).T) / n


def signed(side: Labelled) -> Labelled:
    return side[0], (side[1] > 0).long() * 2 - 1


def test_binary_scores_equal_autograd(small: tuple[Labelled, Labelled]) -> None:
    train, query = map(signed, small)
    weights = torch.randn(5, dtype=torch.float64)
    found = binary_factors(weights, train, query, 0.01)
    expected = by_autograd(weights, lambda w, x, y: F.softplus(-y * (w @ x)), train, query, 0.01)
    assert torch.allclose(found.scores, expected, rtol=1e-10, atol=1e-14)


def test_binary_factors_are_the_lectures(small: tuple[Labelled, Labelled]) -> None:
    (x, y), (query_x, query_y) = map(signed, small)
    weights = torch.randn(5, dtype=torch.float64)
    found = binary_factors(weights, (x, y), (query_x, query_y), 0.01)
    chance = (x @ weights).sigmoid()
    hessian = (x.T * chance * (1 - chance)) @ x / 30 + 0.01 * torch.eye(5).double()
    inverse = torch.linalg.inv(hessian)
    for q in range(4):
        assert float(found.query_residual[q]) == pytest.approx(float((-query_y[q] * (weights @ query_x[q])).sigmoid()))
        for i in range(30):
            assert float(found.labels[q, i]) == float(query_y[q] * y[i])
            assert float(found.features[q, i]) == pytest.approx(float(query_x[q] @ inverse @ x[i]))
            assert float(found.training_loss[i]) == pytest.approx(float((-y[i] * (weights @ x[i])).sigmoid()))
    assert torch.allclose(found.closeness, found.labels * found.features)


def test_multinomial_scores_equal_autograd(small: tuple[Labelled, Labelled]) -> None:
    weights = torch.randn(3, 5, dtype=torch.float64)
    found = multinomial_factors(weights, *small, 0.01)
    expected = by_autograd(weights, lambda w, x, y: F.cross_entropy(w @ x, y), *small, 0.01)
    assert torch.allclose(found.scores, expected, rtol=1e-10, atol=1e-14)


def test_closed_form_equals_the_estimator(digits: dict[str, Any]) -> None:
    net = nn.Linear(64, 10).double()
    net.load_state_dict({"weight": digits["weights"][:, :64], "bias": digits["weights"][:, 64]})
    train, query = (TensorDataset(digits[side][0][:, :64], digits[side][1]) for side in ("train", "test"))
    expected = InfluenceFunction(GaussNewton(), damping=digits["decay"])(net, train, query).scores
    found = multinomial_factors(digits["weights"], digits["train"], digits["test"], digits["decay"]).scores
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-10


def test_two_classes_are_the_binary_regression_factor_by_factor(small: tuple[Labelled, Labelled]) -> None:
    (train, query), theta = small, torch.randn(5, dtype=torch.float64)
    binary = [signed(side) for side in small]
    two = [(x, (y + 1) // 2) for x, y in binary]
    for leverage in (False, True):
        one = binary_factors(theta, *binary, 0.01, leverage)
        other = multinomial_factors(torch.stack([-theta / 2, theta / 2]), *two, 0.02, leverage)
        for name in Factors.__dataclass_fields__:
            assert torch.allclose(getattr(one, name), getattr(other, name)), (name, leverage)
        assert torch.allclose(one.labels * one.features, one.closeness) is not leverage
    assert len(train[0]) == 30
    assert len(query[0]) == 4


def test_factors_stay_finite_where_the_softmax_is_saturated(small: tuple[Labelled, Labelled]) -> None:
    weights = 1e3 * torch.randn(3, 5, dtype=torch.float64)
    found = multinomial_factors(weights, *small, 0.01)
    for name in Factors.__dataclass_fields__:
        assert bool(getattr(found, name).isfinite().all()), name
    assert float(found.training_loss.min()) == 0
    assert float(found.training_loss.max()) == pytest.approx(1)


@pytest.mark.parametrize(("leverage", "slope", "error"), [(False, 1.18, 0.185), (True, 1.055, 0.0735)])
def test_closed_form_predicts_leave_one_out_retraining(
    digits: dict[str, Any], leverage: bool, slope: float, error: float
) -> None:
    factors = multinomial_factors(digits["weights"], digits["train"], digits["test"], digits["decay"], leverage)
    found = Retrained(factors.scores, digits["actual"])
    assert found.pearson >= (0.998 if leverage else 0.994)
    assert found.spearman >= 0.9978
    assert found.slope == pytest.approx(slope, abs=0.005)
    assert found.relative_error == pytest.approx(error, abs=0.0005)


def test_leverage_correction_is_the_newton_step_without_the_sample(small: tuple[Labelled, Labelled]) -> None:
    """The step on J − ℓ_i/n from its own gradient and Hessian, both built without sample i."""
    (x, y), weights, n = small[0], torch.randn(3, 5, dtype=torch.float64), 30
    chances = (x @ weights.T).softmax(1)
    inverse = inverse_curvature(x, chances, 0.01)
    residuals = chances - F.one_hot(y)
    corrected = leverage_corrected(x, chances, residuals, inverse)
    for i in (0, 7, 29):
        kept = [j for j in range(n) if j != i]
        hessian = torch.linalg.inv(inverse_curvature(x[kept], chances[kept], 0.01)) - 0.01 * torch.eye(15).double()
        hessian = hessian * (n - 1) / n + 0.01 * torch.eye(15).double()
        expected = torch.linalg.solve(hessian, torch.outer(residuals[i], x[i]).flatten()) / n
        found = inverse @ torch.outer(corrected[i], x[i]).flatten() / n
        assert torch.allclose(found, expected)


def test_leverage_of_one_output_is_the_textbooks(small: tuple[Labelled, Labelled]) -> None:
    x, chances = small[0][0], torch.rand(30, 1, dtype=torch.float64)
    inverse = inverse_curvature(x, chances, 0.01)
    bent = (chances * (1 - chances))[:, 0]
    leverage = bent * torch.stack([row @ inverse @ row for row in x]) / 30
    found = leverage_corrected(x, chances, torch.ones(30, 1, dtype=torch.float64), inverse)
    assert torch.allclose(found[:, 0], 1 / (1 - leverage))
    assert float(leverage.max()) > 0.1


def test_fit_is_scikit_learns_optimum(small: tuple[Labelled, Labelled]) -> None:
    (x, y), _ = small
    found = fit_logistic_regression(x, y, 3, 0.01)
    model = LogisticRegression(C=1 / (30 * 0.01), fit_intercept=False, tol=1e-9, max_iter=5000).fit(x, y)
    assert torch.allclose(found, torch.tensor(model.coef_), atol=1e-5)
    chances = (x @ found.T).softmax(1)
    gradient = (chances - F.one_hot(y)).T @ x / 30 + 0.01 * found
    assert float(gradient.norm()) < 1e-10
    assert torch.allclose(fit_logistic_regression(x, y, 3, 0.01, start=found + 1), found, atol=1e-8)


def test_fit_finds_its_way_from_afar(small: tuple[Labelled, Labelled]) -> None:
    (x, y), _ = small
    start = 30 * torch.randn(3, 5, dtype=torch.float64)
    assert torch.allclose(
        fit_logistic_regression(x, y, 3, 1e-3, start), fit_logistic_regression(x, y, 3, 1e-3), atol=1e-7
    )


def test_impact_of_subsets_is_their_mean_absolute_score(small: tuple[Labelled, Labelled]) -> None:
    train, query = small
    found = impact_by_size(train, query, [12, 30], 0.01, draws=2)
    weights = fit_logistic_regression(*train, 3, 0.01)
    whole = multinomial_factors(weights, train, query, 0.01).scores.abs().mean()
    assert found.shape == (2, 2)
    assert torch.allclose(found[1], whole.expand(2))
    assert float(found[0].min()) > float(whole)
    assert float(found[0, 0]) != float(found[0, 1])
    assert torch.equal(found, impact_by_size(train, query, [12, 30], 0.01, draws=2))
    assert not torch.equal(found, impact_by_size(train, query, [12, 30], 0.01, draws=2, seed=1))


@pytest.mark.usefixtures("unchecked")
def test_errors_are_named(small: tuple[Labelled, Labelled]) -> None:
    train, query = small
    binary, weights = [signed(side) for side in small], torch.zeros(3, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"train: expected labels −1 and 1, got \[0, 1, 2\]"):
        binary_factors(weights[0], train, binary[1], 0.01)
    with pytest.raises(ValueError, match="query: expected labels −1 and 1"):
        binary_factors(weights[0], binary[0], query, 0.01)
    with pytest.raises(ValueError, match="train: expected classes from 0 to 1, got 0 to 2"):
        multinomial_factors(weights[:2], *small, 0.01)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        multinomial_factors(weights[:1], *small, 0.01)
    for decay in (0.0, float("nan")):
        with pytest.raises(ValueError, match="decay: expected a positive number"):
            fit_logistic_regression(*train, 3, decay)
    with pytest.raises(FloatingPointError, match="weights, features"):
        multinomial_factors(weights * torch.nan, *small, 0.01)
    with pytest.raises(ValueError, match=r"sizes: expected numbers from 1 to 30, got \[31\]"):
        impact_by_size(train, query, [31], 0.01)
    chances = torch.full((30, 3), 1 / 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected \(30, 3\) and \(15, 15\), got \(30, 3\) and \(5, 5\)"):
        leverage_corrected(train[0], chances, chances, torch.eye(5).double())
    with pytest.raises(ValueError, match="leverages below 1"):
        leverage_corrected(train[0], chances, chances, 1e3 * torch.eye(15).double())


def test_a_fit_that_does_not_converge_is_an_error(
    small: tuple[Labelled, Labelled], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_interp.influence.logistic.NEWTON_STEPS", 2)
    with pytest.raises(FloatingPointError, match="after 2 steps"):
        fit_logistic_regression(*small[0], 3, 0.01)
