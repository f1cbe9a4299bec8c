"""How many samples go through a network at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from lightning_interp.data.samples import Samples
from lightning_interp.influence import EKFAC, GaussNewton, IdentityCurvature, InfluenceFunction
from tests.influence.nets import Mean


def head_on(width: int) -> nn.Module:
    """A small trained layer behind a frozen one of this width."""
    frozen = nn.Sequential(nn.Linear(4, width), nn.Unflatten(1, (2, -1)), Mean()).requires_grad_(False)
    return nn.Sequential(frozen, nn.Linear(2, 3))


class Listed(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sequence[Tensor]:
        return self.data[index]


@pytest.fixture
def data() -> TensorDataset:
    return TensorDataset(torch.randn(100, 4), torch.arange(100) % 3)


def by_its_own_collate(data: TensorDataset) -> Samples:
    return Samples(Listed(data), collate=lambda items: default_collate(items))


def at_once(net: nn.Module, data: Any) -> int:
    return InfluenceFunction(IdentityCurvature(), damping=1.0).fit(net, data).reader.max_batch_size


def test_small_networks_take_samples_by_the_thousand(data: TensorDataset) -> None:
    assert at_once(head_on(10), data) == at_once(head_on(10), Listed(data)) == 1024
    assert at_once(head_on(10), by_its_own_collate(data)) == 64


def test_what_a_loader_reads_goes_through_the_network_whole(data: TensorDataset) -> None:
    seen: list[int] = []
    net = head_on(10)
    fitted = InfluenceFunction(IdentityCurvature(), damping=1.0).fit(net, DataLoader(Listed(data), 8, shuffle=True))
    net.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    assert fitted(data).train_ids.tolist() == list(range(100))
    assert set(seen) == {100}


def test_what_a_frozen_part_makes_counts(data: TensorDataset) -> None:
    made = 2 * 20_000
    assert 64 <= at_once(head_on(20_000), data) < 2**20 // made + 64


def test_large_networks_keep_the_users_batch(data: TensorDataset) -> None:
    assert at_once(head_on(200_000), data) == 64


def test_batches_change_no_score(data: TensorDataset) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = TensorDataset(data.tensors[0].double(), data.tensors[1])
    query = TensorDataset(*data[:3])
    for curvature in (EKFAC(1000), GaussNewton(1000)):
        estimator = InfluenceFunction(curvature, damping=0.1)
        one, other = estimator(net, data, query), estimator(net, by_its_own_collate(data), query)
        assert torch.allclose(one.scores, other.scores, rtol=1e-8)


class Ways(nn.Module):
    """Goes by the values it sees, with a parameter outside layers; or gives classes at many positions."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.scale, self.out, self.positions = nn.Parameter(torch.ones(4)), nn.Linear(4, 3 * positions), positions

    def forward(self, x: Tensor) -> Tensor:
        made = self.out(x * self.scale if bool(x.sum() < 1e9) else x)
        return made.unflatten(1, (3, self.positions)) if self.positions > 1 else made


def test_what_is_slow_or_mixed_is_said(data: TensorDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = InfluenceFunction(EKFAC(), damping=0.1).fit(Ways(1), data).notes
    assert any(note.startswith("scale: torch.func cannot follow") for note in slow)
    tokens = TensorDataset(data.tensors[0], torch.randint(0, 3, (100, 2)))
    estimator = InfluenceFunction(GaussNewton(), damping=0.1)
    assert not any("mixtures" in note for note in estimator.fit(Ways(2), tokens).notes)
    monkeypatch.setattr("lightning_interp.influence.gradients.ggn_columns.MOST_ENUMERATED", 5)
    assert any("8 random mixtures" in note for note in estimator.fit(Ways(2), tokens).notes)


class Padded(nn.Module):
    """Mean of what a table and a layer make of tokens; token 0 is padding and does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.out = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        counts = (tokens > 0).to(self.mix.weight)[:, :, None]
        return self.out((self.mix(self.table(tokens)).tanh() * counts).sum(1) / counts.sum(1))


def padded(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return pad_sequence([tokens for tokens, _ in samples], True), torch.tensor([label for _, label in samples])


@pytest.mark.parametrize("curvature", [EKFAC(1000), GaussNewton(1000), GaussNewton(), IdentityCurvature()])
def test_batches_of_other_lengths_change_no_score(curvature: EKFAC) -> None:
    torch.manual_seed(0)
    net = Padded().double()
    texts = [
        (torch.randint(1, 9, (int(length),)), place % 3) for place, length in enumerate(torch.randint(2, 8, (12,)))
    ]
    estimator = InfluenceFunction(curvature, damping=0.1)
    one, other = (
        estimator(net, *(DataLoader(some, size, collate_fn=padded) for some in (texts, texts[:5])))  # type: ignore[arg-type]
        for size in (3, 12)
    )
    assert torch.allclose(one.scores, other.scores, rtol=1e-8)
    assert float(one.scores.abs().max()) > 1e-3
