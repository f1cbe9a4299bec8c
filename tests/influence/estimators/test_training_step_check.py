"""LightningModules as they come, by their outputs and by their own training step: a right answer, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_interp import Task
from lightning_interp.data.samples import Samples
from lightning_interp.influence import EKFAC, GaussNewton, Hessian, IdentityCurvature, InfluenceFunction
from lightning_interp.influence.estimators.training_step_check import check_training_step
from tests.influence.nets import Loose, TiedTokens, brute_force

DAMPING = 0.05


class Module(pl.LightningModule):
    """A classifier that logs, counts, and keeps what it saw."""

    def __init__(self, net: nn.Module, classes: int = 3) -> None:
        super().__init__()
        self.net, self.accuracy = net, MulticlassAccuracy(classes)
        self.seen: list[Tensor] = []
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log_dict({"accuracy": self.accuracy})
        self.seen.append(logits)
        self.steps += 1
        return self.loss(logits, batch[1])

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, y)
        self.log("loss", loss)
        return loss


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(x.unflatten(1, (4, 3)).transpose(0, 1))[1][0])


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x.unflatten(1, (3, 4))).mean(1))


def normalised() -> nn.Module:
    norm = nn.BatchNorm1d(5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean, norm.running_var = torch.randn(5), torch.rand(5) + 0.5
    return nn.Sequential(nn.Linear(12, 5), norm, nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))


NETS: dict[str, Callable[[], nn.Module]] = {
    "weights tied": TiedTokens,
    "transformer": Attentive,
    "gru": Recurrent,
    "batch norm": normalised,
    "parameters outside layers": Loose,
}


def data(name: str, n: int) -> TensorDataset:
    if name == "weights tied":
        return TensorDataset(torch.randint(0, 7, (n, 3)), torch.arange(n) % 7)
    width = 24 if name == "parameters outside layers" else 12
    return TensorDataset(torch.randn(n, width, dtype=torch.float64), torch.arange(n) % 3)


def linear(kind: type[Module] = Module) -> tuple[Module, TensorDataset, TensorDataset]:
    return kind(nn.Linear(12, 3)).double(), data("linear", 8), data("linear", 2)


def deep() -> tuple[Module, TensorDataset, TensorDataset]:
    return Module(normalised()).double(), data("batch norm", 9), data("batch norm", 2)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("task", [Task(), Task.from_training_step()], ids=["outputs", "training step"])
def test_scores_are_those_of_brute_force(name: str, task: Task) -> None:
    net, train, query = (
        Module(NETS[name](), 7 if name == "weights tied" else 3).double().train(),
        data(name, 9),
        data(name, 2),
    )
    found = InfluenceFunction(GaussNewton(), DAMPING)(net, train, query, task)
    assert torch.allclose(found.scores, brute_force(net, train, query, DAMPING), rtol=1e-8, atol=1e-12)
    assert found.left_out == {}
    x, y = query.tensors
    assert torch.allclose(found.query_losses, F.cross_entropy(net.eval()(x), y, reduction="none"))


@pytest.mark.parametrize("curvature", [GaussNewton(1000), EKFAC(), Hessian(), IdentityCurvature()])
def test_both_ways_agree_for_every_curvature(curvature: Any) -> None:
    net, train, query = linear() if isinstance(curvature, Hessian) else deep()
    estimator = InfluenceFunction(curvature, DAMPING)
    fitted = [estimator.fit(net, train, task) for task in (Task(), Task.from_training_step())]
    assert torch.allclose(fitted[0](query).scores, fitted[1](query).scores, rtol=1e-8, atol=1e-12)
    ours, theirs = (each.self_influence() for each in fitted)
    assert torch.allclose(ours.scores, theirs.scores, rtol=1e-8)
    assert torch.allclose(ours.losses, theirs.losses)


def test_the_step_leaves_nothing_behind() -> None:
    net, train, query = linear()
    net.accuracy.update(torch.eye(3), torch.tensor([0, 1, 1]))
    before = float(net.accuracy.compute())
    InfluenceFunction(GaussNewton(), DAMPING)(net, train, query, Task.from_training_step())
    assert (net.seen, net.steps) == ([], 0)
    assert net.accuracy.update_count == 1
    net.accuracy._computed = None
    assert float(net.accuracy.compute()) == before
    assert not {"log", "log_dict"} & vars(net).keys()
    with pytest.raises(ZeroDivisionError):
        Task.from_training_step().total(net.requires_grad_(False), (torch.zeros(2, 12).double(), Broken()))
    assert (net.seen, net.steps) == ([], 0)
    assert not {"log", "log_dict"} & vars(net).keys()


class Broken(Tensor):
    """Targets that nothing can be done with."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise ZeroDivisionError


class Short(Module):
    """A step that takes no index and returns a dictionary."""

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return {"loss": self.loss(self(batch[0]), batch[1]), "more": 1}


def test_steps_may_return_a_dictionary_and_take_no_index() -> None:
    net, train, query = linear(Short)
    found = InfluenceFunction(GaussNewton(), DAMPING)(net, train, query, Task.from_training_step())
    assert torch.allclose(found.scores, brute_force(net, train, query, DAMPING), rtol=1e-8, atol=1e-12)


class Weighted(Module):
    """The first two classes weigh the same."""

    weights = torch.tensor([1.0, 1.0, 5.0], dtype=torch.float64)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, self.weights)


class Summed(Module):
    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="sum")


class Mixing(Module):
    """Each sample is compared with the others of its batch."""

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits - logits.mean(0), y)


@pytest.mark.parametrize("kind", [Weighted, Summed, Mixing])
@pytest.mark.parametrize("curvature", [GaussNewton(), IdentityCurvature()])
def test_a_loss_that_is_no_mean_over_samples_is_refused(kind: type[Module], curvature: Any) -> None:
    net, train, query = linear(kind)
    with pytest.raises(ValueError, match=r"mean over samples, but .* together .* pass task=Task\(loss=...\)"):
        InfluenceFunction(curvature, DAMPING)(net, train, query, Task.from_training_step())


def test_the_kind_is_settled_for_gradients_alone_too() -> None:
    net = Regression(nn.Linear(12, 1)).double()
    train = TensorDataset(torch.randn(300, 12, dtype=torch.float64), torch.cat([torch.ones(150), torch.rand(150)]))
    task = check_training_step(Task.from_training_step(), net, Samples(train), IdentityCurvature())
    assert task.kind == "regression"


class Regression(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0])[:, 0], batch[1].double())


def test_weights_are_seen_where_the_data_are_sorted() -> None:
    net = Weighted(nn.Linear(12, 3)).double()
    train = TensorDataset(torch.randn(900, 12, dtype=torch.float64), torch.arange(3).repeat_interleave(300))
    with pytest.raises(ValueError, match="mean over samples"):
        check_training_step(Task.from_training_step(), net, Samples(train), IdentityCurvature())


def test_a_weighted_loss_given_per_sample_is_right() -> None:
    net, train, query = linear(Weighted)
    task = Task(loss=lambda logits, y: F.cross_entropy(logits, y, reduction="none") * Weighted.weights[y])
    found = InfluenceFunction(GaussNewton(), DAMPING)(net, train, query, task)
    expected = brute_force(net, train, query, DAMPING, Weighted.weights)
    assert torch.allclose(found.scores, expected, rtol=1e-8, atol=1e-12)


class Penalised(Module):
    """A mean over samples that the outputs alone do not give."""

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y) + 0.1 * sum(p.square().sum() for p in self.net.parameters())


class Formless(Module):
    """No forward that a Task could call."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("no forward")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("kind", [Penalised, Formless])
def test_where_outputs_do_not_agree_gradients_alone_are_offered(kind: type[Module]) -> None:
    net, train, query = linear(kind)
    task = Task.from_training_step()
    for estimator in (InfluenceFunction(GaussNewton(), DAMPING), InfluenceFunction()):
        with pytest.raises(ValueError, match="IdentityCurvature") as caught:
            estimator(net, train, query, task)
        assert ("no forward" in str(caught.value)) == (kind is Formless)
    found = InfluenceFunction(IdentityCurvature())(net, train, query, task)
    rows = []
    for x, y in [*zip(*query.tensors, strict=True), *zip(*train.tensors, strict=True)]:
        loss = task.total(net, (x[None], y[None]))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.net.parameters()))]))
    expected = torch.stack(rows[:2]) @ torch.stack(rows[2:]).T / len(train)
    assert torch.allclose(found.scores, expected, rtol=1e-9, atol=1e-12)


class Smoothed(Module):
    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=0.2)


def test_a_loss_that_agrees_can_be_given_beside_the_step() -> None:
    net, train, query = linear(Smoothed)

    def smoothed(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=0.2, reduction="none")

    estimator = InfluenceFunction(GaussNewton(), DAMPING)
    with pytest.raises(ValueError, match="is not that of its training step"):
        estimator(net, train, query, Task.from_training_step())
    found = estimator(net, train, query, Task.from_training_step(loss=smoothed))
    assert torch.allclose(found.scores, estimator(net, train, query, Task(loss=smoothed)).scores, rtol=1e-8)


class Manual(Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False


class Silent(Module):
    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self(batch[0])


class Several(Module):
    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="none")


def test_what_is_no_training_step_is_refused() -> None:
    _, train, query = linear()
    estimator, task = InfluenceFunction(IdentityCurvature()), Task.from_training_step()
    for kind, message in (
        (Manual, "optimises manually"),
        (Silent, "got a NoneType"),
        (Several, r"shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator(linear(kind)[0], train, query, task)
    with pytest.raises(TypeError, match="with training_step, got Linear"):
        estimator(nn.Linear(12, 3).double(), train, query, task)
    with pytest.raises(TypeError, match="a function or None"):
        Task(step=1)  # type: ignore[arg-type]
    several = Task(step=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1], reduction="none"))
    with pytest.raises(ValueError, match=r"one loss, shape \(\)"):
        estimator(linear()[0], train, query, several)
