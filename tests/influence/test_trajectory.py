"""Damping from a training's own trajectory, against real retraining and real optimizers."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_interp.influence.damping import Damping
from lightning_interp.influence.trajectory import Path, Trajectory, rate_of

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
        self.losses = {3: held["loss"], 20: held["loss_of_20_seeds"]}
        self.curvature = sum(self.ggn(x) for x in train_x.float().split(300)) / len(train_x)
        self.train, self.query = self.gradients(train_x.float(), train_y), self.gradients(test_x.float(), test_y)[:100]

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
        p = self.logits(self.params, x).softmax(1)
        return ((p - F.one_hot(y, 10))[:, None] @ self.jacobian(x))[:, 0]

    def agreement(self, damping: Tensor) -> dict[int, float]:
        """Linear datamodeling score of the exact influence under a damping `(p,)`, by seeds in the retrainings."""
        matrix = self.curvature.double() + torch.diag(damping.double())
        solved = torch.cholesky_solve(self.query.double().T, torch.linalg.cholesky(matrix))
        predicted = self.masks @ (self.train.double() @ solved).numpy()
        return {
            seeds: float(np.mean([spearmanr(predicted[:, q], -loss[:, q])[0] for q in range(100)]))
            for seeds, loss in self.losses.items()
        }


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
    assert found[3] >= 0.675
    assert found[20] >= 0.735
    mean_eigenvalue = retrained.curvature.diagonal().mean()
    assert retrained.agreement(0.1 * mean_eigenvalue * torch.ones(len(retrained.curvature)))[20] <= 0.55


Make = Callable[[list[Tensor]], Optimizer]


def path_after(make: Make, steps: int, gradient: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Path]:
    """Return three numbers that started at zero, and their path."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer, rate_sum = make([parameter]), 0.0
    for step in range(steps):
        parameter.grad = gradient(parameter.detach(), step)
        rate_sum += rate_of(optimizer.param_groups[0])
        optimizer.step()
    return parameter.detach(), Path.of(optimizer, optimizer.param_groups[0], parameter, steps, rate_sum)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda p: torch.optim.SGD(p, 0.01), 1e-4),
        (lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), 0.01),
        (lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True), 0.01),
        (lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, dampening=0.5), 0.01),
        (lambda p: torch.optim.SGD(p, 0.01, dampening=0.5), 1e-4),
        (lambda p: torch.optim.Adam(p, 0.01), 1e-4),
        (lambda p: torch.optim.Adam(p, torch.tensor(0.01), fused=True), 1e-4),
        (lambda p: torch.optim.Adam(p, 0.01, eps=0.5), 1e-4),
        (lambda p: torch.optim.Adam(p, 0.01, amsgrad=True), 1e-4),
        (lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.0), 1e-4),
        (lambda p: torch.optim.NAdam(p, 0.01), 0.01),
        (lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.9, momentum=0.5), 0.02),
        (lambda p: torch.optim.Adagrad(p, 0.01), 0.03),
    ],
)
def test_a_steady_gradient_moves_a_parameter_by_rate_sum_over_divisor(make: Make, error: float) -> None:
    gradient = torch.tensor([0.1, -3.0, 1.0])
    moved, path = path_after(make, 1000, lambda *_: gradient.clone())
    divisor = 1.0 if path.divisor is None else path.divisor
    assert torch.allclose(moved, -path.rate_sum * gradient / divisor, rtol=error)
    assert path.steps == 1000


def test_amsgrad_goes_by_the_largest_and_centred_rmsprop_by_the_variance() -> None:
    def falling(_: Tensor, step: int) -> Tensor:
        return torch.tensor([1.0, 2.0, 3.0]) * (10.0 if step < 50 else 1.0) + 5.0 * (-1) ** step

    _, plain = path_after(lambda p: torch.optim.Adam(p, 0.01, betas=(0.9, 0.9)), 200, falling)
    _, largest = path_after(lambda p: torch.optim.Adam(p, 0.01, betas=(0.9, 0.9), amsgrad=True), 200, falling)
    assert torch.allclose(plain.divisor, torch.tensor([26.0, 29.0, 34.0]).sqrt(), rtol=0.05)
    assert torch.allclose(largest.divisor, torch.tensor([125.0, 425.0, 925.0]).sqrt(), rtol=0.05)
    _, centred = path_after(lambda p: torch.optim.RMSprop(p, 0.01, centered=True, alpha=0.99), 2000, falling)
    assert torch.allclose(centred.divisor, torch.tensor(5.0), rtol=0.02)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_weight_decay_is_that_of_the_penalty_where_training_comes_to_rest(kind: type[Optimizer]) -> None:
    curvature, best, noise = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, -2.0, 3.0]), 4.0
    moved, path = path_after(
        lambda p: kind(p, lr=0.01, weight_decay=0.2),
        3000,
        lambda at, step: curvature * (at - best) + noise * (-1) ** step,
    )
    penalty = path.damping(k=1e-12)
    assert torch.allclose(moved, curvature * best / (curvature + penalty), rtol=0.01)
    assert path.decoupled == (kind is torch.optim.AdamW)


def test_damping_is_the_formula() -> None:
    assert Path("SGD", 10, 4.0, weight_decay=0.01).damping(2.0) == pytest.approx(0.51)
    divisor = torch.tensor([1.0, 3.0])
    assert Path("Adam", 10, 4.0, weight_decay=0.01, divisor=divisor).damping(2.0).tolist() == pytest.approx(
        [0.51, 1.51]
    )
    decoupled = Path("AdamW", 10, 4.0, weight_decay=0.01, decoupled=True, divisor=divisor)
    assert decoupled.damping(2.0).tolist() == pytest.approx([0.51, 1.53])


def test_one_number_where_it_is_the_same_for_all() -> None:
    alike = {"a": Path("SGD", 20, 230.0, 1e-3), "b": Path("SGD", 20, 230.0, 1e-3)}
    damping = Trajectory(alike).damping()
    said = "SGD: weight decay 0.001 + 2/τ, τ = Σ lr / (1 − momentum) = 230 over 20 steps"
    assert damping == Damping(1e-3 + 2 / 230, said)
    assert damping.on("anything") == 1e-3 + 2 / 230
    other = Trajectory(alike | {"b": Path("SGD", 1010, 115.0, 0.0)}).damping(k=3.0)
    assert other.on("a") == pytest.approx(1e-3 + 3 / 230)
    assert other.on("b") == pytest.approx(3 / 115)
    assert other.origin == (
        "SGD: weight decay 0 to 0.001 + 3/τ, τ = Σ lr / (1 − momentum) = 115 to 230 over 20 to 1,010 steps"
    )
    with pytest.raises(ValueError, match="expected one for 'c', got those of a, b"):
        other.on("c")


def test_each_rule_is_said() -> None:
    some = torch.tensor([1.0, 2.0])
    damping = Trajectory(
        {
            "a": Path("Adam", 5, 0.5, divisor=some, idle=1),
            "b": Path("AdamW", 5, 0.5, 0.1, decoupled=True, divisor=some),
            "c": Path("RMSprop", 5, 0.5, divisor=some),
            "d": Path("MySGD", 5, 0.5),
        }
    ).damping()
    assert damping.origin.split("; ") == [
        "Adam: weight decay 0 + 2 (√v̂ + ε) / Σ lr per parameter, Σ lr = 0.5 over 5 steps,"
        " 1 of 2 parameters never had a gradient and get the smallest damping",
        "AdamW: (√v̂ + ε) × (weight decay 0.1 + 2 / Σ lr) per parameter, Σ lr = 0.5 over 5 steps",
        "RMSprop (as if it were one of Adam's kind): weight decay 0 + 2 (√v̂ + ε) / Σ lr per parameter,"
        " Σ lr = 0.5 over 5 steps",
        "MySGD (as if it were plain SGD): weight decay 0 + 2/τ, τ = Σ lr / (1 − momentum) = 0.5 over 5 steps",
    ]


def test_a_parameter_without_gradients_gets_the_least(unchecked: None) -> None:
    _, path = path_after(lambda p: torch.optim.Adam(p, 0.01, eps=0.0), 100, lambda *_: torch.tensor([0.0, 1.0, 2.0]))
    assert path.idle == 1
    assert path.divisor.tolist() == pytest.approx([1e-8, 1.0, 2.0], rel=1e-3)


@pytest.mark.parametrize(("kept", "read"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_half_precision_is_read_as_single(kept: torch.dtype, read: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=kept))
    parameter.grad = torch.ones(2, dtype=kept)
    optimizer = torch.optim.Adam([parameter], 0.01)
    optimizer.step()
    path = Path.of(optimizer, optimizer.param_groups[0], parameter, 1, 0.01)
    assert path.divisor.dtype is read
    assert path.divisor.tolist() == pytest.approx([1.0, 1.0], rel=1e-2)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_where_a_group_does_not_say_it_adamw_is_known_by_its_name(kind: type[Optimizer]) -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = kind([parameter], weight_decay=0.1)
    optimizer.step()
    older = {key: value for key, value in optimizer.param_groups[0].items() if key != "decoupled_weight_decay"}
    assert Path.of(optimizer, older, parameter, 1, 0.01).decoupled == (kind is torch.optim.AdamW)


class Lion(Optimizer):
    """Keeps no second moment."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


class Factored(Lion):
    """Keeps a second moment of another shape."""

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"exp_avg_sq": torch.ones(1)}


@pytest.mark.parametrize(
    ("make", "gradient", "message"),
    [
        (Lion, 1.0, "expected SGD, or a state with a second moment"),
        (lambda p: torch.optim.Adadelta(p), 1.0, "expected SGD, or a state with a second moment"),
        (lambda p: torch.optim.Adagrad(p, lr_decay=0.1), 1.0, "expected SGD, or a state with a second moment"),
        (Factored, 1.0, r"each of \(3,\) parameters, got \(1,\)"),
        (lambda p: torch.optim.SGD(p, 0.1, maximize=True), 1.0, "maximize"),
        (lambda p: torch.optim.SGD(p, 0.0), 1.0, "rate_sum: expected a positive"),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=1.0), 1.0, "rate_sum: expected a positive"),
        (lambda p: torch.optim.Adam(p), float("nan"), "divisor: expected positive numbers"),
    ],
)
def test_what_is_not_known_is_refused(make: Make, gradient: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        path_after(make, 3, lambda *_: torch.full((3,), gradient))


def test_errors_are_named() -> None:
    with pytest.raises(ValueError, match="weight_decay: expected a number from 0, got -1"):
        Path("SGD", 1, 1.0, weight_decay=-1.0)
    with pytest.raises(ValueError, match=r"damping\(k=...\): expected a positive number, got 0"):
        Trajectory({"a": Path("SGD", 1, 1.0)}).damping(k=0.0)


def test_no_damping_where_anything_is_unknown() -> None:
    assert Trajectory({}).damping() is None
    assert Trajectory({}).why_not == "no step of an optimizer was recorded"
    partly = Trajectory({"a": Path("SGD", 1, 1.0)}, {"b": "Lion: who knows", "c": "Lion: who knows"})
    assert partly.damping() is None
    assert partly.why_not == "b (and 1 more): Lion: who knows"
    assert Trajectory({"a": Path("SGD", 1, 1.0)}).why_not == ""


def test_state_survives_a_checkpoint() -> None:
    paths = {"a": Path("SGD", 3, 0.3), "b": Path("AdamW", 5, 0.5, 0.1, True, torch.tensor([1.0, 2.0]), 1)}
    before = Trajectory(paths, {"c": "gone"})
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = Trajectory.of_state(torch.load(file, weights_only=True))
    assert after.unknown == before.unknown
    assert vars(after.paths["a"]) == vars(paths["a"])
    assert torch.equal(after.paths["b"].divisor, paths["b"].divisor)
    assert {**vars(after.paths["b"]), "divisor": 0} == {**vars(paths["b"]), "divisor": 0}
