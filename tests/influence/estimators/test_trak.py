"""TRAK: against a slow transcription, and against retraining."""

from __future__ import annotations

from math import isnan
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from lightning_interp.influence import TRAK
from lightning_interp.influence.estimators.trak import margin
from lightning_interp.influence.gradients.factored import FactoredGradients
from lightning_interp.influence.gradients.projection import Projection

DATA = Path(__file__).parents[2] / "data"


def network(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def samples(n: int, classes: int = 3) -> TensorDataset:
    return TensorDataset(torch.randn(n, 6, dtype=torch.float64), torch.arange(n) % classes)


def naive_margin(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = net(x[None])[0]
    chance = logits.sigmoid() if len(logits) == 1 else logits.softmax(0)[y]
    chance = 1 - chance if len(logits) == 1 and y == 0 else chance
    chance = chance.squeeze()
    return (chance / (1 - chance)).log(), 1 - chance


def naive_features(net: nn.Module, data: TensorDataset, projection: Projection) -> tuple[Tensor, Tensor]:
    """Return projected gradients of the margins, made one sample at a time, and 1 − p."""
    rows, doubts = [], []
    for x, y in data:
        value, doubt = naive_margin(net, x, y)
        grads = torch.autograd.grad(value, list(net.parameters()))
        pairs = {"0.weight": grads[:2], "2.weight": grads[2:]}
        made = {name: torch.cat([w, b[:, None]], dim=1) for name, (w, b) in pairs.items()}
        eye = {name: torch.eye(g.shape[1]).double()[None, None] for name, g in made.items()}
        rows.append(projection({name: FactoredGradients(eye[name], g.T[None, None]) for name, g in made.items()})[0])
        doubts.append(doubt.detach())
    return torch.stack(rows), torch.stack(doubts)


@pytest.mark.parametrize("outputs", [3, 1])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_trak_equals_the_formula(outputs: int, damping: float) -> None:
    nets = [network(outputs) for _ in range(2)]
    train, query = (samples(n, max(2, outputs)) for n in (40, 3))
    found = TRAK([net.state_dict() for net in nets], dim=8, damping=damping, seed=4)(network(outputs), train, query)
    scores, doubts = [], []
    for place, net in enumerate(nets):
        phi, doubt = naive_features(net, train, Projection(8, 4 + place))
        asked, _ = naive_features(net, query, Projection(8, 4 + place))
        kernel = phi.T @ phi + len(train) * damping * torch.eye(8)
        scores.append(asked @ torch.linalg.solve(kernel, phi.T))
        doubts.append(doubt)
    expected = torch.stack(scores).mean(0) * torch.stack(doubts).mean(0)
    assert torch.allclose(found.scores, expected, rtol=1e-7, atol=1e-10)
    assert found.unit == "none"
    assert isnan(found.gradient_norm)
    assert found.damping == damping if damping else isnan(found.damping)
    assert "2 networks" in found.method
    assert found.coverage == 1


def test_without_models_it_is_the_networks_own() -> None:
    net, train, query = network(), samples(40), samples(3)
    own = TRAK(dim=8)(net, train, query)
    given = TRAK([net.state_dict()], dim=8)(network(), train, query)
    assert torch.equal(own.scores, given.scores)
    losses = torch.nn.functional.cross_entropy(net(query.tensors[0]), query.tensors[1], reduction="none")
    assert torch.allclose(own.query_losses, losses.detach())


def test_candidates_and_the_top_are_those_of_the_whole() -> None:
    net, train, query = network(), Subset(samples(40), range(39, -1, -1)), samples(3)
    whole = TRAK(dim=8)(net, train, query)
    some = TRAK(dim=8)(net, train, query, candidates=[5, 0])
    assert torch.allclose(some.scores, whole.scores[:, [5, 0]])
    assert some.train_ids.tolist() == [34, 39]
    top = TRAK(dim=8)(net, train, query, top_k=2)
    assert torch.equal(top.helpful(2)[0], whole.helpful(2)[0])


def test_margins_are_log_odds_also_where_nothing_is_in_doubt() -> None:
    logits = torch.tensor([[200.0, 0.0, -10.0], [0.5, -1.0, 2.0]], dtype=torch.float64)
    found = margin(logits, torch.tensor([0, 1]), "classes")
    chance = float(logits[1].softmax(0)[1])
    assert found.tolist() == pytest.approx([200.0 - np.log1p(np.exp(-10.0)), np.log(chance / (1 - chance))])
    assert margin(torch.tensor([[2.0], [3.0]]), torch.tensor([0, 1]), "binary").tolist() == [-2.0, 3.0]


def test_errors_are_named() -> None:
    with pytest.raises(ValueError, match="at most 40"):
        TRAK(dim=64)(network(), samples(40), samples(3))
    regression = TensorDataset(torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="classifier with one label per sample, got regression"):
        TRAK(dim=8)(network(), regression, regression)
    with pytest.raises(ValueError, match="samples in both, got 40 and 0"):
        TRAK(dim=8)(network(), samples(40), Subset(samples(3), []))
    with pytest.raises(ValueError, match="0 or a positive number"):
        TRAK(damping=-1.0)
    with pytest.raises(ValueError, match="expected a list"):
        TRAK([])
    same = TensorDataset(torch.ones(40, 6, dtype=torch.float64), torch.zeros(40).long())
    with pytest.raises(FloatingPointError, match="positive definite"):
        TRAK(dim=8)(network(), same, same)


def test_trak_ranks_subsets_of_a_real_network_less_well_than_curvature() -> None:
    held = np.load(DATA / "digits_mlp_subsets.npz")
    images = np.load(DATA / "digits_logistic_regression.npz")
    train, query = (
        TensorDataset(torch.tensor(images[f"{part}_x"]).float(), torch.tensor(images[f"{part}_y"]))
        for part in ("train", "test")
    )
    net = nn.Sequential()
    for name, layer in (("fc1", nn.Linear(64, 64)), ("act", nn.ReLU()), ("fc2", nn.Linear(64, 10))):
        net.add_module(name, layer)
    net.load_state_dict({name: torch.tensor(held[name]) for name in net.state_dict()})
    masks = np.unpackbits(held["masks"], axis=1)[:, : len(train)]
    lds = []
    for estimator in (TRAK(), TRAK(damping=0.01)):
        predicted = masks @ estimator(net, train, query).scores.double().numpy().T
        lds.append(np.mean([spearmanr(predicted[:, q], -held["loss"][:, q])[0] for q in range(len(query))]))
    assert 0.29 < lds[0] < 0.35
    assert lds[1] > 0.48
