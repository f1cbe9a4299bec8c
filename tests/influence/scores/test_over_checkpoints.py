"""Sums over several sets of weights: the top that is kept of chunks is that of all scores, and no tensor grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_interp.data.samples import Samples
from lightning_interp.influence import TRAK, TracIn
from lightning_interp.influence.curvature import projected
from lightning_interp.influence.estimators.ensemble import Estimator, only_top
from lightning_interp.influence.gradients import reader
from lightning_interp.influence.scores import over_checkpoints

State = dict[str, Tensor]
ESTIMATORS: dict[str, Callable[[list[State]], Estimator]] = {
    "TRAK, three networks": lambda states: TRAK(states, dim=8, seed=3),
    "TRAK": lambda states: TRAK(dim=8),
    "TracIn": lambda states: TracIn(states, [0.5, 0.1, 0.02]),
}


@pytest.fixture(params=ESTIMATORS)
def estimator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Estimator:
    monkeypatch.setattr(over_checkpoints, "CHUNK_SAMPLES", 10)
    monkeypatch.setattr(reader, "LARGEST_BATCH", 4)
    return ESTIMATORS[request.param]([network().state_dict() for _ in range(3)])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def samples(n: int, batch: int = 4) -> DataLoader[Any]:
    """Return samples that are read backwards, in batches."""
    data = TensorDataset(torch.randn(n, 6, dtype=torch.float64), torch.arange(n) % 3)
    return DataLoader(Subset(data, range(n - 1, -1, -1)), batch)


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor has that is made meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.size = max(self.size, *(x.numel() for x in tree_leaves(made) if isinstance(x, Tensor)), 0)
        return made


def largest(estimator: Estimator, n: int, top_k: int | None) -> int:
    model, train, query = network(), samples(n), samples(10, 10)
    with Largest() as seen:
        estimator(model, train, query, top_k=top_k)
    return seen.size


@pytest.mark.parametrize("candidates", [None, [70, 3, 50, *range(20, 45)]])
def test_the_top_of_chunks_is_the_top_of_all_scores(estimator: Estimator, candidates: list[int] | None) -> None:
    model, train, query = network(), samples(83), samples(4)
    whole = estimator(model, train, query, candidates=candidates)
    found, expected = estimator(model, train, query, candidates=candidates, top_k=2), only_top(whole, 2)
    for name in ("columns", "train_ids", "train_targets", "query_targets"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("scores", "mean", "query_losses"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-12), name
    assert found.scores.shape[1] < whole.scores.shape[1]
    assert found.n_scored == whole.scores.shape[1] == (83 if candidates is None else 28)
    assert (found.method, found.notes, found.curvature_n) == (whole.method, whole.notes, whole.curvature_n)
    assert any("28 of 83 training samples" in note for note in found.notes) == (candidates is not None)


def test_no_tensor_grows_with_the_training_samples_but_all_scores_do(
    estimator: Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projected, "PILED_ROWS", 10)
    queries, lists, chunk = 10, 3, 12
    bound = queries * (queries * lists + chunk)
    assert largest(estimator, 100, 1) <= bound
    assert largest(estimator, 100, None) >= queries * 100 > 2 * bound


def test_samples_to_score_and_a_positive_top_are_expected(estimator: Estimator) -> None:
    model, train, query = network(), samples(40), samples(4)
    with pytest.raises(ValueError, match="candidates: expected training samples to score"):
        estimator(model, train, query, candidates=[])
    with pytest.raises(ValueError, match="number from 1, got 0"):
        estimator(model, train, query, top_k=0)


def test_chunks_are_whole_batches_and_one_where_all_is_kept() -> None:
    train = Samples.of(samples(10_000, 1000))
    assert [len(part) for part in over_checkpoints.sample_chunks(train, 1)] == [5000, 5000]
    assert [len(part) for part in over_checkpoints.sample_chunks(train, None)] == [10_000]
    assert [part.ids[0] for part in over_checkpoints.sample_chunks(train, 1)] == [9999, 4999]
