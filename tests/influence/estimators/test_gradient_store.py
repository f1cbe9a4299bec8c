"""A folder of projected gradients: questions without a pass over the training data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_interp.influence import Damping, GradientStore, InfluenceFunction, ProjectedGaussNewton, stored
from lightning_interp.influence.estimators.gradient_store import HEAD, weights_key
from lightning_interp.influence.results import Influence


class Counted(Dataset[Any]):
    """A dataset that counts how often it is read."""

    def __init__(self, data: TensorDataset) -> None:
        self.data, self.reads = data, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.reads += 1
        return self.data[index]


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


@pytest.fixture
def train() -> Counted:
    return Counted(TensorDataset(torch.randn(60, 6), torch.arange(60) % 3))


@pytest.fixture
def query() -> TensorDataset:
    return TensorDataset(torch.randn(4, 6), torch.tensor([0, 2, 1, 1]))


def apart(found: Influence, expected: Influence) -> float:
    """Return the largest difference of scores, relative to the largest score."""
    return float((found.scores - expected.scores).abs().max() / expected.scores.abs().max())


ESTIMATOR = InfluenceFunction(ProjectedGaussNewton(32), damping=0.05)


def test_questions_read_no_training_sample(
    net: nn.Module, train: Counted, query: TensorDataset, tmp_path: Path
) -> None:
    fitted = ESTIMATOR.fit(net, train)
    expected, own = fitted(query), fitted.self_influence().scores
    train.reads = 0
    store = stored(fitted, tmp_path / "store")
    assert train.reads == 60
    for held in (store, GradientStore.open(tmp_path / "store")):
        found = held(net, query)
        assert torch.allclose(held.self_influence(), own, rtol=1e-2)
        assert len(held) == 60
    assert train.reads == 60
    assert apart(found, expected) < 1e-3
    for name in ("train_ids", "train_targets", "query_targets", "query_losses"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("method", "damping", "covered", "left_out", "covered_elements", "curvature_n", "unit"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
    assert found.mean is not None
    assert expected.mean is not None
    assert torch.allclose(found.mean, expected.mean, rtol=1e-2, atol=1e-6)
    assert any("half precision" in note for note in found.notes)


def test_candidates_the_top_and_one_query_alone(
    net: nn.Module, train: Counted, query: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(ESTIMATOR.fit(net, Subset(train, range(59, -1, -1))), tmp_path)
    whole = store(net, query)
    assert whole.train_ids.tolist() == list(range(59, -1, -1))
    monkeypatch.setattr(sys.modules[GradientStore.__module__], "ROWS_READ_AT_ONCE", 7)
    some = store(net, query, candidates=[12, 3])
    assert torch.allclose(some.scores, whole.scores[:, [12, 3]])
    assert some.train_ids.tolist() == [47, 56]
    assert torch.equal(some.train_targets, whole.train_targets[[12, 3]])
    assert "2 of 60 training samples" in some.notes[0]
    top = store(net, query, top_k=3)
    assert top.n_scored == 60
    for name in ("helpful", "harmful", "surprising"):
        assert torch.equal(getattr(top, name)(3)[0], getattr(whole, name)(3)[0]), name
    one = store(net, Subset(query, [2]))
    assert torch.allclose(one.scores, whole.scores[[2]], rtol=1e-4, atol=1e-7)


def test_other_weights_are_refused(net: nn.Module, train: Counted, query: TensorDataset, tmp_path: Path) -> None:
    store = stored(ESTIMATOR.fit(net, train), tmp_path)
    with torch.no_grad():
        net[0].bias[0] += 1e-6
    with pytest.raises(ValueError, match="expected the weights whose gradients are in"):
        store(net, query)


def test_a_store_is_written_once_for_the_same_facts(
    net: nn.Module, train: Counted, query: TensorDataset, tmp_path: Path
) -> None:
    stored(ESTIMATOR.fit(net, train), tmp_path)
    again = ESTIMATOR.fit(net, train)
    train.reads = 0
    first = stored(again, tmp_path)
    assert train.reads == 0
    files = set(os.listdir(tmp_path))
    for other in (
        InfluenceFunction(ProjectedGaussNewton(32), damping=0.06),
        InfluenceFunction(ProjectedGaussNewton(32, seed=1), damping=0.05),
        InfluenceFunction(ProjectedGaussNewton(16), damping=0.05),
        InfluenceFunction(ProjectedGaussNewton(32), damping=0.05, layers=["3"]),
    ):
        fitted = other.fit(net, train)
        train.reads = 0
        store = stored(fitted, tmp_path)
        assert train.reads == 60, other
        assert apart(store(net, query), fitted(query)) < 1e-3
        assert len(set(os.listdir(tmp_path)) - files) == 1
        files = set(os.listdir(tmp_path))
        assert len(files) == 2
    assert first.facts["key"] not in "".join(files)


def test_a_damping_per_parameter_is_kept(net: nn.Module, train: Counted, query: TensorDataset, tmp_path: Path) -> None:
    values = {name: torch.rand_like(p) + 0.01 if "weight" in name else 0.02 for name, p in net.named_parameters()}
    fitted = InfluenceFunction(ProjectedGaussNewton(32), Damping(values, "recorded")).fit(net, train)
    stored(fitted, tmp_path)
    found = GradientStore.open(tmp_path)(net, query)
    expected = fitted(query)
    assert apart(found, expected) < 1e-3
    assert "damping: recorded" in found.notes
    assert found.damping == expected.damping


def test_a_failure_leaves_what_was_there(net: nn.Module, train: Counted, query: TensorDataset, tmp_path: Path) -> None:
    store = stored(ESTIMATOR.fit(net, train), tmp_path)
    before, files = store(net, query).scores, sorted(os.listdir(tmp_path))
    other = InfluenceFunction(ProjectedGaussNewton(32), damping=0.5).fit(net, train)
    kept = train.data.tensors[0].clone()
    train.data.tensors[0][40:] = torch.nan
    with pytest.raises(FloatingPointError, match="training gradients"):
        stored(other, tmp_path)
    train.data.tensors[0].copy_(kept)
    assert sorted(os.listdir(tmp_path)) == files
    assert torch.equal(GradientStore.open(tmp_path)(net, query).scores, before)


def test_gradients_are_half_precision_and_keep_their_scale(tmp_path: Path) -> None:
    net = nn.Linear(6, 3, bias=False)
    x = torch.randn(20, 6) * torch.logspace(-9, 6, 20)[:, None]
    fitted = ESTIMATOR.fit(net, TensorDataset(x, net(x).argmin(1)))
    store = stored(fitted, tmp_path)
    (file,) = tmp_path.glob("gradients-*.npy")
    assert np.load(file).dtype == np.float16
    rows = store.rows(torch.arange(20))
    (trace,) = fitted.reader.per_sample_gradients(fitted.train, "")
    expected = store.inverse.project(trace.loss_gradients())
    assert float(expected.abs().amax(1).max()) > 70_000
    assert 0 < float(expected.abs().amax(1).min()) < 1e-8
    assert float(((rows - expected).abs().amax(1) / expected.abs().amax(1)).max()) < 1e-3


def test_errors_are_named(net: nn.Module, train: Counted, query: TensorDataset, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=HEAD):
        GradientStore.open(tmp_path)
    with pytest.raises(ValueError, match=r"expected ProjectedGaussNewton\(...\)"):
        stored(InfluenceFunction(damping=0.1).fit(net, train), tmp_path)
    store = stored(ESTIMATOR.fit(net, train), tmp_path)
    with pytest.raises(ValueError, match="query: expected samples"):
        store(net, Subset(query, []))
    with pytest.raises(ValueError, match="number from 1"):
        store(net, query, top_k=0)
    with pytest.raises(ValueError, match="indices below 60"):
        store(net, query, candidates=[60])


def test_weights_are_known_by_their_bits() -> None:
    net = nn.Linear(2, 2)
    before = weights_key(net)
    assert before == weights_key(net)
    with torch.no_grad():
        net.weight.zero_()
        zero = weights_key(net)
        net.weight.neg_()
    assert len({before, zero, weights_key(net), weights_key(nn.Sequential(net)), weights_key(net.bfloat16())}) == 5
    zeros = nn.Linear(2, 2)
    for parameter in zeros.parameters():
        nn.init.zeros_(parameter)
    assert weights_key(zeros.half()) != weights_key(zeros.bfloat16())
