"""Streams of scores: everything, a file, or the top of each query."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from lightning_interp.influence import EKFAC, IdentityCurvature, InfluenceFunction
from lightning_interp.influence.estimators.fitted import FittedInfluence
from lightning_interp.influence.scores.top_k import ScoreColumns, TopScores, overlap


@pytest.fixture(scope="module")
def asked() -> tuple[FittedInfluence, TensorDataset]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    train = TensorDataset(torch.randn(300, 6), torch.arange(300) % 3)
    query = TensorDataset(torch.randn(4, 6), torch.tensor([0, 1, 2, 1]))
    return InfluenceFunction(EKFAC(), damping=0.1).fit(net, Subset(train, range(299, -1, -1))), query


def test_the_top_alone_is_the_top_of_everything(asked: tuple[FittedInfluence, TensorDataset]) -> None:
    fitted, query = asked
    whole, top = fitted(query), fitted(query, top_k=4)
    assert top.scores.shape[1] <= 4 * 4 * 3
    assert (top.n_scored, whole.n_scored) == (300, 300)
    for name in ("helpful", "harmful", "surprising"):
        for expected, found in zip(getattr(whole, name)(4), getattr(top, name)(4), strict=True):
            assert torch.equal(expected, found), name
    assert top.mean is not None
    assert torch.allclose(top.mean, whole.scores.mean(1))
    assert torch.allclose(whole.centred(), whole.scores - whole.scores.mean(1, keepdim=True))
    assert torch.allclose(top.centred(), whole.centred()[:, top.columns])
    assert top.train_ids.tolist() == [299 - place for place in top.columns.tolist()]


def test_what_is_kept_does_not_grow() -> None:
    top = TopScores(3, torch.tensor([0, 1]))
    sizes = []
    for _ in range(50):
        top.add(torch.randn(2, 100), torch.randint(0, 3, (100,)))
        sizes.append(top.kept().scores.shape[1])
    assert max(sizes) <= 2 * 3 * 3
    assert int(top.kept().places.max()) > 1000


def test_all_scores_in_a_file(asked: tuple[FittedInfluence, TensorDataset], tmp_path: Path) -> None:
    fitted, query = asked
    path = tmp_path / "deep" / "scores.npy"
    found = fitted(query, scores_file=path)
    expected = fitted(query).scores
    assert torch.equal(found.scores, expected)
    assert np.array_equal(np.load(path), expected.numpy())


def test_groups_are_sums_and_know_their_members(asked: tuple[FittedInfluence, TensorDataset]) -> None:
    fitted, query = asked
    found = fitted(query)
    assert torch.allclose(found.group([299, 0]), found.scores[:, 0] + found.scores[:, 299])
    with pytest.raises(ValueError, match="expected scored training samples, got 300"):
        found.group([3, 300])


def test_agreement_is_between_two_dampings(asked: tuple[FittedInfluence, TensorDataset]) -> None:
    fitted, query = asked
    found = fitted(query, check=True)
    other = InfluenceFunction(EKFAC(), damping=0.3)(fitted.coverage.model, fitted.train, query)
    shares = []
    for row in range(4):
        for sign in (1, -1):
            mine, theirs = (
                set((sign * scores[row]).topk(10).indices.tolist()) for scores in (found.scores, other.scores)
            )
            shares.append(len(mine & theirs) / 10)
    assert found.agreement == {"3 × the damping": pytest.approx(sum(shares) / 8)}
    assert 0 < found.agreement["3 × the damping"] < 1


def test_overlap_counts_places() -> None:
    scores = torch.tensor([[3.0, 2.0, -1.0, -2.0]])
    left = ScoreColumns(scores, torch.tensor([5, 6, 7, 8]), torch.zeros(4))
    right = ScoreColumns(scores, torch.tensor([5, 9, 7, 8]), torch.zeros(4))
    assert overlap(left, left, 2) == 1
    assert overlap(left, right, 2) == pytest.approx(0.75)


def test_dot_products_have_no_unit(asked: tuple[FittedInfluence, TensorDataset]) -> None:
    fitted, query = asked
    assert fitted(query).unit == "loss"
    net = fitted.coverage.model
    assert InfluenceFunction(IdentityCurvature(), damping=1.0)(net, fitted.train, query).unit == "none"


def test_errors_are_named(asked: tuple[FittedInfluence, TensorDataset], tmp_path: Path) -> None:
    fitted, query = asked
    with pytest.raises(ValueError, match="a number from 1"):
        fitted(query, top_k=0)
    with pytest.raises(ValueError, match="without scores_file"):
        fitted(query, top_k=2, scores_file=tmp_path / "a.npy")
    with pytest.raises(ValueError, match="query: expected samples"):
        fitted(Subset(query, []))


def test_suspects_come_first(asked: tuple[FittedInfluence, TensorDataset]) -> None:
    fitted, _ = asked
    found = fitted.self_influence()
    order = found.scores.argsort(descending=True)[:5]
    assert found.first(5).tolist() == order.tolist()
    net = fitted.coverage.model
    inputs, labels = zip(*(fitted.train.dataset[i] for i in range(300)), strict=True)
    chance = net(torch.stack(inputs)).softmax(1)
    assert found.suggested is not None
    assert torch.equal(found.suggested, chance.argmax(1))
    assert torch.allclose(found.chance, chance.gather(1, torch.stack(labels)[:, None])[:, 0])
    assert found.ids.tolist() == list(range(299, -1, -1))


def test_queries_among_the_training_samples_are_named(asked: tuple[FittedInfluence, TensorDataset]) -> None:
    fitted, query = asked
    x, y = query.tensors
    there = fitted.train.dataset[10][0]
    mixed = TensorDataset(torch.stack([x[0], there, there.flip(0)]), y[:3])
    assert fitted(mixed, check=True).duplicates == {1: (289,)}
    assert fitted(query, check=True).duplicates == {}
    assert fitted(mixed, candidates=range(100), check=True).duplicates == {1: (289,)}
    assert fitted(mixed, candidates=range(11, 100), check=True).duplicates == {}
