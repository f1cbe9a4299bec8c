"""Perturbed training inputs against finite differences and against retraining."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_interp import Task
from lightning_interp.data.samples import Samples
from lightning_interp.influence import EKFAC, Damping, GaussNewton, IdentityCurvature, InfluenceFunction, LiSSA
from lightning_interp.influence.curvature import Curvature, Solver
from lightning_interp.influence.estimators.fitted import query_gradients
from lightning_interp.influence.perturbation import Front, Steps, craft, input_influence
from lightning_interp.network.undisturbed import differentiable

DECAY = 0.05
CURVATURES = [GaussNewton(), GaussNewton(columns=30), EKFAC(), IdentityCurvature()]


def blobs(n: int, seed: int) -> TensorDataset:
    """Two classes of points in four dimensions, float64, that overlap."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    points = torch.randn(n, 4, generator=draws, dtype=torch.float64)
    return TensorDataset(points + 0.8 * labels[:, None], labels.double()[:, None])


def logistic(data: TensorDataset) -> nn.Module:
    """Train a logistic regression to its optimum by Newton's method; weight decay on the bias too."""
    x, y = F.pad(data.tensors[0], (0, 1), value=1), data.tensors[1][:, 0]
    weights = x.new_zeros(x.shape[1])
    for _ in range(20):
        chance = (x @ weights).sigmoid()
        slope = x.mT @ (chance - y) / len(x) + DECAY * weights
        curvature = (x.mT * (chance * (1 - chance))) @ x / len(x) + DECAY * torch.eye(len(weights)).double()
        weights = weights - torch.linalg.solve(curvature, slope)
    net = nn.Linear(4, 1).double()
    net.load_state_dict({"weight": weights[None, :4], "bias": weights[4:]})
    return net


def small() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    train, query = (TensorDataset(torch.randn(n, 1, 4, 4).double(), torch.arange(n) % 3) for n in (9, 2))
    return net, train, query


def losses(net: nn.Module, data: TensorDataset) -> Tensor:
    return F.binary_cross_entropy_with_logits(net(data.tensors[0]), data.tensors[1], reduction="none")[:, 0].detach()


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("curvature", CURVATURES, ids=repr)
def test_solutions_are_those_that_scores_are_made_of(curvature: Curvature, each: bool) -> None:
    net, train, query = small()
    values = {name: 0.2 + torch.rand_like(p) for name, p in net.named_parameters()}
    damping = Damping(values if each else 0.3, "given")
    fitted = InfluenceFunction(curvature, damping=damping).fit(net, train)
    assert isinstance(fitted.inverse, Solver)
    with differentiable(net):
        asked = query_gradients(fitted.reader, Samples.of(query)).gradients
        rows = query_gradients(fitted.reader, Samples.of(train)).gradients
        solved = fitted.inverse.solve(asked)
        expected = fitted.inverse.against(asked)(rows)
    found = sum(solved[block].flatten(1) @ row.gradients().flatten(1).mT for block, row in rows.items())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert all(solved[block].shape[1:] == shape for block, shape in fitted.coverage.shapes.items())


@pytest.mark.parametrize("curvature", CURVATURES, ids=repr)
def test_the_map_is_the_slope_of_the_score(curvature: Curvature) -> None:
    """Scores are (1/n) ⟨s, ∇ℓ(z)⟩: the map is minus their finite difference in the pixels of z, the curvature kept."""
    net, train, query = small()
    fitted = InfluenceFunction(curvature, damping=0.1).fit(net, train)
    places = [7, 2]
    found = input_influence(fitted, query, places)
    assert found.shape == (2, 2, 1, 4, 4)
    pixels, step = train.tensors[0], 1e-5
    for column, place in enumerate(places):
        for row, at in ((0, 0), (2, 1), (3, 3)):
            ends = []
            for sign in (1, -1):
                pixels[place, 0, row, at] += sign * step
                ends.append(fitted(query, candidates=[place]).scores[:, 0])
                pixels[place, 0, row, at] -= sign * step
            slope = (ends[0] - ends[1]) / (2 * step)
            torch.testing.assert_close(found[:, column, 0, row, at], -slope, rtol=1e-6, atol=1e-9)


def test_the_map_predicts_retraining_on_the_perturbed_sample() -> None:
    train, query, step = blobs(40, 0), blobs(5, 1), 1e-4
    fitted = InfluenceFunction(GaussNewton(), damping=DECAY).fit(logistic(train), train)
    found = input_influence(fitted, query, [3, 11])
    for column, place in enumerate((3, 11)):
        for feature in range(4):
            ends = []
            for sign in (1, -1):
                x = train.tensors[0].clone()
                x[place, feature] += sign * step
                ends.append(losses(logistic(TensorDataset(x, train.tensors[1])), query))
            torch.testing.assert_close(
                found[:, column, feature], (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-9
            )


def test_inputs_of_a_dict_and_dropout_are_taken_as_they_are() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.drop = nn.Linear(4, 3), nn.Dropout()

        def forward(self, points: Tensor) -> Tensor:
            return self.drop(self.fc(points))

    net, points = Named(), torch.randn(8, 4)
    rows = [{"points": point, "labels": torch.tensor(place % 3)} for place, point in enumerate(points)]
    fitted = InfluenceFunction(GaussNewton(), damping=0.1).fit(net, rows)
    plain = InfluenceFunction(GaussNewton(), damping=0.1).fit(net, TensorDataset(points, torch.arange(8) % 3))
    torch.testing.assert_close(input_influence(fitted, rows[:2], [1]), input_influence(plain, rows[:2], [1]))
    assert net.training
    assert net.fc.weight.grad is None


def test_crafted_samples_raise_the_loss_within_the_radius() -> None:
    train, query = blobs(40, 0), blobs(3, 1)
    before = [tensor.clone() for tensor in train.tensors]
    steps = Steps(count=10, size=0.04, radius=0.1, low=-5.0, high=5.0)
    found = craft(InfluenceFunction(GaussNewton(), damping=DECAY), logistic, train, query, [3, 11], steps)
    moved = (found.inputs - found.originals).abs()
    assert float(moved.max()) <= 0.1 + 1e-12
    assert float(moved.min()) > 0.09, "in a convex problem each feature has one way that hurts, and goes to its end"
    summed = found.losses.sum(1)
    assert len(summed) == 11
    assert bool((summed[1:3] > summed[:2]).all())
    assert all(torch.equal(a, b) for a, b in zip(train.tensors, before, strict=True))
    changed = TensorDataset(train.tensors[0].index_copy(0, torch.tensor([3, 11]), found.inputs), train.tensors[1])
    torch.testing.assert_close(found.losses[-1], losses(logistic(changed), query))
    assert_best_corner(found.inputs, found.originals, found.losses[-1].sum(), train, query)


def assert_best_corner(
    inputs: Tensor, originals: Tensor, reached: Tensor, train: TensorDataset, query: TensorDataset
) -> None:
    """Check that none of 30 random changes as large does as much harm."""
    for _ in range(30):
        x = train.tensors[0].clone()
        x[[3, 11]] = originals + 0.1 * torch.randn_like(inputs).sign()
        assert losses(logistic(TensorDataset(x, train.tensors[1])), query).sum() <= reached + 1e-12


def test_the_slope_goes_on_through_a_frozen_front() -> None:
    """A front that doubles and turns the features: its inputs are pushed along its transpose."""
    train, query = blobs(40, 0), blobs(3, 1)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    front = nn.Linear(4, 4, bias=False).double()
    front.load_state_dict({"weight": 2 * turn})
    raw = train.tensors[0] @ turn / 2
    estimator = InfluenceFunction(GaussNewton(), damping=DECAY)
    steps = Steps(count=1, size=0.01, radius=1.0, low=-9.0, high=9.0)
    found = craft(estimator, logistic, train, query, [3], steps, Front(front, raw[[3]]))
    slope = input_influence(estimator.fit(logistic(train), train), query, [3]).sum(0) @ turn
    torch.testing.assert_close(found.inputs - raw[[3]], 0.01 * slope.sign())
    assert float(found.losses[1].sum()) > float(found.losses[0].sum())


def test_it_stops_when_that_is_enough_and_stays_between_the_bounds() -> None:
    train, query = blobs(40, 0), blobs(3, 1)
    estimator = InfluenceFunction(GaussNewton(), damping=DECAY)
    seen: list[nn.Module] = []

    def third(model: nn.Module) -> bool:
        seen.append(model)
        return len(seen) == 3

    found = craft(estimator, logistic, train, query, [3], Steps(9, 0.5, 3.0, -0.2, 0.4, third))
    assert len(found.losses) == 3
    assert found.model is seen[-1]
    assert float(found.inputs.min()) >= -0.2
    assert float(found.inputs.max()) <= 0.4


def test_what_cannot_be_perturbed_is_refused() -> None:
    tokens = TensorDataset(torch.randint(0, 5, (6, 3)), torch.arange(6) % 2)
    reader = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2))
    fitted = InfluenceFunction(GaussNewton(), damping=0.1).fit(reader, tokens)
    with pytest.raises(TypeError, match=r"expected inputs of floats to perturb, got torch\.int64"):
        input_influence(fitted, tokens, [0])
    net, train, query = small()
    with pytest.raises(TypeError, match=r"expected a curvature whose inverse has `solve`, got LiSSA"):
        input_influence(InfluenceFunction(LiSSA(iterations=2), damping=0.1).fit(net, train), query, [0])
    with pytest.raises(TypeError, match="train: expected a TensorDataset"):
        craft(InfluenceFunction(), logistic, [1, 2], query, [0], task=Task())
    with pytest.raises(ValueError, match=r"Steps\(radius=...\): expected a positive number, got 0.0"):
        Steps(radius=0.0)
