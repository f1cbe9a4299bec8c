"""Checkpoints in a network for a while, TracIn along them, and means over them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_interp.influence import EKFAC, Ensemble, GaussNewton, IdentityCurvature, InfluenceFunction, TracIn
from lightning_interp.influence.estimators.ensemble import combine
from lightning_interp.network.weights import loaded

State = dict[str, Tensor]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture
def net() -> nn.Module:
    return network()


@pytest.fixture
def states() -> list[State]:
    return [network().state_dict() for _ in range(3)]


@pytest.fixture
def data() -> tuple[TensorDataset, TensorDataset]:
    train = TensorDataset(torch.randn(40, 6, dtype=torch.float64), torch.arange(40) % 3)
    return train, TensorDataset(torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 2, 1]))


def gradients(net: nn.Module, data: TensorDataset) -> Tensor:
    net.eval()
    rows = [torch.autograd.grad(F.cross_entropy(net(x[None]), y[None]), list(net.parameters())) for x, y in data]
    return torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])


def test_tracin_equals_the_formula(net: nn.Module, states: list[State], data: tuple[TensorDataset, ...]) -> None:
    train, query = data
    found = TracIn(states, [0.5, 0.1, 0.02])(net, train, query)
    expected = torch.zeros(3, 40, dtype=torch.float64)
    for state, rate in zip(states, (0.5, 0.1, 0.02), strict=True):
        other = network()
        other.load_state_dict(state)
        expected += rate * gradients(other, query) @ gradients(other, train).T
    assert torch.allclose(found.scores, expected, rtol=1e-9)
    assert found.unit == "none"
    assert found.damping != found.damping
    assert found.notes == ()
    assert found.coverage == 1
    assert "3 checkpoints" in found.method
    assert torch.allclose(
        TracIn(states, 0.5)(net, train, query).scores, TracIn(states, [0.5] * 3)(net, train, query).scores
    )


def test_candidates_and_the_top_are_those_of_the_whole(
    net: nn.Module, states: list[State], data: tuple[TensorDataset, ...]
) -> None:
    train, query = data
    backwards = Subset(train, range(39, -1, -1))
    whole = TracIn(states)(net, backwards, query)
    some = TracIn(states)(net, backwards, query, candidates=[5, 0])
    assert torch.allclose(some.scores, whole.scores[:, [5, 0]])
    assert some.train_ids.tolist() == [34, 39]
    top = TracIn(states)(net, backwards, query, top_k=2)
    assert top.scores.shape[1] <= 3 * 3 * 2
    for name in ("helpful", "harmful", "surprising"):
        assert torch.equal(getattr(top, name)(2)[0], getattr(whole, name)(2)[0])
    assert top.n_scored == 40
    assert torch.allclose(top.centred(), whole.centred()[:, top.columns])


def test_everything_is_put_back_bit_by_bit(
    net: nn.Module, states: list[State], data: tuple[TensorDataset, ...]
) -> None:
    with torch.no_grad():
        net[0].bias[0], net[1].running_mean[1] = torch.nan, -0.0
    held, before = list(net.parameters()), {name: value.clone() for name, value in net.state_dict().items()}
    TracIn(states)(net, *data)
    with pytest.raises(ZeroDivisionError), loaded(net, states[0]):
        _ = 1 / 0
    with loaded(net, states[0]):
        assert torch.equal(net[0].weight, states[0]["0.weight"])
    with (
        pytest.raises(ValueError, match=r"(?s)does not fit Sequential.*9\.bias"),
        loaded(net, states[0] | {"9.bias": held[0]}),
    ):
        pass
    assert all(one is other for one, other in zip(held, net.parameters(), strict=True))
    for name, value in net.state_dict().items():
        assert torch.equal(value.view(torch.int64), before[name].view(torch.int64)), name
    assert net.training


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.5)


def test_files_are_checkpoints_too(tmp_path: Path) -> None:
    train = TensorDataset(torch.randn(12, 6), torch.arange(12) % 3)
    module = Module()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, 4))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    torch.save(module.state_dict(), tmp_path / "state.pt")
    save_file(module.state_dict(), tmp_path / "state.safetensors")
    expected = TracIn([module.state_dict()])(module, train, train).scores
    for name in ("run.ckpt", "state.pt", "state.safetensors"):
        assert torch.equal(TracIn([tmp_path / name])(Module(), train, train).scores, expected), name


def test_files_that_hold_other_things_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": Path()}, tmp_path / "more.ckpt")
    torch.save([1.0], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="load it yourself"), loaded(Module(), tmp_path / "more.ckpt"):
        pass
    with pytest.raises(ValueError, match="expected a state dict"), loaded(Module(), tmp_path / "list.pt"):
        pass


def test_an_ensemble_is_the_mean_of_its_members(
    net: nn.Module, states: list[State], data: tuple[TensorDataset, ...]
) -> None:
    estimator = InfluenceFunction(GaussNewton(), damping=0.1)
    found = Ensemble(estimator, states)(net, *data)
    members = []
    for state in states:
        net.load_state_dict(state)
        members.append(estimator(net, *data))
    for name in ("scores", "query_losses"):
        expected = torch.stack([getattr(member, name) for member in members]).mean(0)
        assert torch.allclose(getattr(found, name), expected), name
    assert found.gradient_norm == pytest.approx(sum(member.gradient_norm for member in members) / 3)
    assert found.damping == 0.1
    assert found.unit == "loss"
    assert "mean over 3 checkpoints" in found.method
    assert Ensemble(estimator, states)(net, *data, top_k=1).scores.shape[1] < 40


def test_dampings_that_differ_are_said(net: nn.Module, states: list[State], data: tuple[TensorDataset, ...]) -> None:
    found = Ensemble(InfluenceFunction(EKFAC()), states)(net, *data)
    assert found.damping != found.damping
    assert sum("each set of weights its own" in note for note in found.notes) == 1
    assert len(set(found.notes)) == len(found.notes)


def test_scores_without_a_unit_have_no_damping_and_predict_no_loss(
    net: nn.Module, states: list[State], data: tuple[TensorDataset, ...]
) -> None:
    large = [TensorDataset(100 * part.tensors[0], part.tensors[1]) for part in data]
    found = Ensemble(InfluenceFunction(IdentityCurvature()), states)(net, *large)
    assert bool((found.scores < -found.query_losses[:, None]).any())
    assert found.notes == ()
    parts = [dataclasses.replace(found, damping=float("nan")) for _ in range(2)]
    assert combine(parts, [0.5, 0.5]).notes == ()


def test_errors_are_named(
    net: nn.Module, states: list[State], data: tuple[TensorDataset, ...], unchecked: None
) -> None:
    for wrong in ([], states[0], "run.ckpt"):
        with pytest.raises(ValueError, match="expected a list of state dicts or paths"):
            TracIn(wrong)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Ensemble(InfluenceFunction(), ["nowhere.ckpt"])
    for rates in ([0.1], [0.1, 0.1, -1.0], 0.0, [0.1, 0.1, float("nan")]):
        with pytest.raises(ValueError, match="one for each of the 3 checkpoints"):
            TracIn(states, rates)
    with pytest.raises(ValueError, match="samples in both, got 0 and 3"):
        TracIn(states)(net, Subset(data[0], []), data[1])
    for k in (0, -1):
        with pytest.raises(ValueError, match="number from 1"):
            TracIn(states)(net, *data, top_k=k)
