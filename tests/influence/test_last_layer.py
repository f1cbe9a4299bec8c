"""The last layer retrained alone, beside optima that are found otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_interp.data.task import Task
from lightning_interp.influence import (
    KFAC,
    Damping,
    GaussNewton,
    InfluenceFunction,
    LastLayer,
    Retrained,
    last_layer,
    leave_k_out,
    leave_one_out,
)
from lightning_interp.influence.last_linear import last_linear
from lightning_interp.influence.logistic import fit_logistic_regression

N, CLASSES, DECAY = 60, 3, 1e-2


@pytest.fixture
def data() -> TensorDataset:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, generator=draws)
    return TensorDataset(x, (x[:, :CLASSES] + torch.randn(N, CLASSES, generator=draws)).argmax(1))


def network(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES))


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def minimum(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Descend to a gradient below 1e-10, by another method."""
    at = start.clone().requires_grad_()
    options = {"max_iter": 2000, "tolerance_grad": 1e-11, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    search = torch.optim.LBFGS([at], **options)  # type: ignore[arg-type]

    def closure() -> float:
        search.zero_grad()
        value = objective(at)
        value.backward()
        return float(value.detach())

    search.step(closure)
    return at.detach()


def test_at_an_optimum_it_is_the_regression_without_the_samples(data: TensorDataset) -> None:
    x, y = data.tensors
    layer = nn.Linear(4, CLASSES).double()
    best = fit_logistic_regression(with_ones(x), y, CLASSES, DECAY)
    layer.load_state_dict({"weight": best[:, :-1], "bias": best[:, -1]})
    last = LastLayer.of(layer, TensorDataset(x.double(), y), TensorDataset(x[:5].double(), y[:5]), damping=DECAY)
    kept = [i for i in range(N) if i not in (3, 17, 18)]
    wanted = fit_logistic_regression(with_ones(x[kept]), y[kept], CLASSES, DECAY)
    assert (last.retrain(kept) - wanted).norm() < 1e-3 * (wanted - best).norm()
    assert torch.equal(last.retrain(range(N)), best)


@pytest.mark.parametrize("bias", [True, False])
def test_away_from_an_optimum_what_training_left_is_kept(data: TensorDataset, bias: bool) -> None:
    x, y = data.tensors
    net = network().double().eval()
    if not bias:
        net[3].bias = None
    shape = net[3].weight.shape
    damping: dict[str, float | Tensor] = {
        "3.weight": torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.1
    }
    damping |= {"3.bias": 0.2} if bias else {}
    train = TensorDataset(x.double(), y)
    last = LastLayer.of(net, train, train, damping=Damping(damping, "given"))
    features = net[:3](x.double()).detach()
    features = with_ones(features) if bias else features
    shift = damping["3.weight"]
    assert isinstance(shift, Tensor)
    shift = torch.cat([shift, torch.full((CLASSES, 1), 0.2)], dim=1) if bias else shift
    kept, start = list(range(5, N)), last.trained
    at = start.clone().requires_grad_()
    (mean,) = torch.autograd.grad(F.cross_entropy(features @ at.T, y), at)

    def objective(w: Tensor) -> Tensor:
        moved = w - start
        return F.cross_entropy(features[kept] @ w.T, y[kept]) - (mean * moved).sum() + (shift * moved**2).sum() / 2

    wanted = minimum(objective, start)
    assert (last.retrain(kept) - wanted).norm() < 1e-3 * (wanted - start).norm()
    assert last.losses(wanted).shape == (N,)
    assert torch.allclose(last.losses(start), F.cross_entropy(net(x.double()), y, reduction="none"))


def test_influence_of_the_last_layer_predicts_it(data: TensorDataset) -> None:
    net = network()
    query = TensorDataset(*data[:6])
    last = LastLayer.of(net, data, query, damping=0.1)
    scores = InfluenceFunction(GaussNewton(), 0.1, layers=["3"])(net, data, query).scores
    which = list(range(0, N, 4))
    moved = leave_one_out(last.retrain, last.losses, last.n, which)
    found = Retrained((scores - scores.mean(1, keepdim=True))[:, which], moved)
    assert found.pearson > 0.999
    assert found.slope == pytest.approx(1, abs=0.1)


def test_without_a_damping_it_takes_a_share_of_the_layers_curvature(data: TensorDataset) -> None:
    net = network()
    wanted = InfluenceFunction(KFAC(), layers=["3"]).fit(net, data).damping.typical
    assert LastLayer.of(net, data, data).damping.unique().tolist() == pytest.approx([wanted])


def test_the_network_is_left_as_it_was(data: TensorDataset) -> None:
    net = network().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    last = LastLayer.of(net, data, data, damping=0.1)
    last.losses(last.retrain(range(10)))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Shaped(nn.Module):
    """Outputs of another shape than the last layer's, or changed."""

    def __init__(self, out: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.out, self.change = nn.Linear(4, 5), nn.Linear(5, out), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.out(self.inner(x).tanh()))


class ByKeyword(Shaped):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(input=self.inner(x).tanh())


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


def test_a_single_number_may_lose_its_dimension(data: TensorDataset) -> None:
    x, _ = data.tensors
    train = TensorDataset(x, x.sum(1))
    torch.manual_seed(0)
    net = Shaped(1, lambda out: out.squeeze(-1))
    last = LastLayer.of(net, train, train, damping=0.1)
    loss = (net(x) - x.sum(1)).square()
    assert torch.allclose(last.losses(last.trained), loss.double(), atol=1e-5)
    best = last.retrain(range(N))
    assert torch.equal(best, last.trained)
    assert not torch.allclose(last.retrain(range(30)), best, atol=1e-3)


def test_half_precision_features_are_retrained_in_single(data: TensorDataset) -> None:
    x, y = data.tensors
    net = network().bfloat16()
    train = TensorDataset(x.bfloat16(), y)
    last = LastLayer.of(net, train, train, damping=0.1)
    assert last.train.features.dtype == torch.float32
    assert last.retrain(range(20)).isfinite().all()


def test_a_step_that_goes_too_far_is_halved() -> None:
    x = torch.linspace(-1, 1, 12)[:, None]
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(4.0)
    task = Task(loss=lambda out, target: torch.nn.functional.softplus(20 * (out - target))[:, 0] / 20)
    data = TensorDataset(x, torch.zeros(12, 1))
    last = LastLayer.of(layer, data, data, task, damping=1e-4)
    kept = list(range(4, 12))
    mean = torch.autograd.grad(task.loss(x.double() @ (at := last.trained.clone().requires_grad_()), 0.0).mean(), at)[0]

    def objective(w: Tensor) -> Tensor:
        moved = w - last.trained
        return task.loss(x[kept].double() @ w.T, 0.0).mean() - (mean * moved).sum() + 1e-4 * moved.square().sum() / 2

    wanted = minimum(objective, last.trained)
    assert (last.retrain(kept) - wanted).norm() < 1e-3 * (wanted - last.trained).norm()


def test_positions_share_the_layer() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 7, 4), torch.randint(3, (20, 7))
    task = Task(
        loss=lambda out, target: (
            F.cross_entropy(out.flatten(0, 1), target.flatten(), reduction="none").reshape(target.shape).mean(1)
        )
    )
    net = Shaped(3, lambda out: out)
    last = LastLayer.of(net, TensorDataset(x, y), TensorDataset(x[:4], y[:4]), task, damping=0.1)
    assert last.train.features.shape == (20, 7, 6)
    scores = InfluenceFunction(GaussNewton(), 0.1, layers=["out"])(
        net, TensorDataset(x, y), TensorDataset(x[:4], y[:4]), task
    ).scores
    moved = leave_k_out(last.retrain, last.losses, 20, [[0], [1], [2], [3]])
    assert Retrained((scores - scores.mean(1, keepdim=True))[:, :4], moved).pearson > 0.99


def test_what_cannot_be_retrained_alone_is_named(data: TensorDataset) -> None:
    batch = data[:2]
    tied = Shaped(5, lambda out: out)
    tied.inner = nn.Linear(5, 5)
    tied.out.weight = tied.inner.weight
    again = Shaped(4, lambda out: out)
    again.change = lambda out: again.out(again.inner(out))
    frozen = Shaped(3, lambda out: out)
    frozen.out.requires_grad_(False)
    half = Shaped(3, lambda out: out)
    half.out.bias.requires_grad_(False)
    cases: Sequence[tuple[nn.Module, str]] = [
        (frozen, "'out', which is frozen"),
        (half, "which is frozen, or its bias is"),
        (Shaped(3, lambda out: out.relu() + 0 * out.sum(1, keepdim=True)), "Shaped are of another shape, or changed"),
        (Shaped(3, lambda out: out.clamp(max=8.0)), "changed behind it"),
        (nn.Sequential(nn.Linear(4, 5), nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))), "made of bias, param"),
        (nn.Sequential(nn.Linear(4, 5), Cosine(5, 3)), "returns W x . b, got '1', a Cosine that does not"),
        (ByKeyword(3, lambda out: out), "called as layer.x."),
        (Shaped(3, lambda out: out.log_softmax(-1)), "Shaped are of another shape, or changed behind it"),
        (nn.Sequential(nn.Flatten()), "Sequential are of another shape"),
        (again, "'out', which is called again"),
        (nn.Sequential(nn.Linear(4, 5), tied), "whose weight is also 1.inner.weight"),
    ]
    for net, said in cases:
        with pytest.raises(ValueError, match=said):
            last_linear(net, Task(), batch)
    with pytest.raises(ValueError, match="got training steps"):
        last_linear(network(), Task.from_training_step(), batch)
    single = Task(loss=lambda out, y: F.cross_entropy(out, y, weight=torch.ones(3), reduction="none"))
    with pytest.raises(ValueError, match="loss with two derivatives in outputs of float64 on the CPU"):
        last_linear(network(), single, batch)
    assert last_linear(network(), Task(), batch) == "3"


class Autocast(Shaped):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def test_half_precision_inside_the_network_is_no_other_layer(data: TensorDataset) -> None:
    torch.manual_seed(0)
    net = Autocast(3, lambda out: out)
    assert last_linear(net, Task(), data[:4]) == "out"
    last = LastLayer.of(net, data, data, damping=0.1)
    assert last.train.features.dtype == torch.float32
    assert torch.allclose(
        last.losses(last.trained),
        F.cross_entropy(net(data.tensors[0]).float(), data.tensors[1], reduction="none").double(),
        atol=2e-2,
    )


def test_the_head_that_the_task_reads_is_found(data: TensorDataset) -> None:
    net = Shaped(3, lambda out: out)
    net.other = nn.Linear(3, 3)
    both = Task(outputs=lambda module, x: (module(x), module.other(torch.ones(len(x), 3)))[0])
    assert last_linear(net, both, data[:2]) == "out"


def test_targets_that_happen_to_be_0_or_1_are_still_numbers(data: TensorDataset) -> None:
    x, _ = data.tensors
    net = Shaped(1, lambda out: out)
    train, query = TensorDataset(x, x.sum(1, keepdim=True)), TensorDataset(x[:3], torch.tensor([[0.0], [1.0], [0.0]]))
    last = LastLayer.of(net, train, query, damping=0.1)
    wanted = (net(x[:3]) - query.tensors[1]).square()[:, 0].detach()
    assert torch.allclose(last.losses(last.trained), wanted.double(), atol=1e-5)


def test_a_network_that_is_the_layer_and_large_features() -> None:
    torch.manual_seed(0)
    x, y = 1e3 * torch.randn(30, 4), torch.arange(30) % 3
    layer = nn.Linear(4, 3)
    last = LastLayer.of(layer, TensorDataset(x, y), TensorDataset(x, y))
    assert last.name == ""
    assert last.retrain(range(1, 30)).isfinite().all()
    layer.weight.data.mul_(1e-3)
    flat = LastLayer.of(layer, TensorDataset(x, y), TensorDataset(x, y), damping=1e-6)
    assert flat.retrain(range(1, 30)).isfinite().all()
    assert torch.equal(last._shares([0, 0, 1])[:2], torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))
    with pytest.raises(ValueError, match="expected indices of training samples, got none"):
        last.retrain([])


def test_a_small_damping_keeps_its_value_in_half_precision(data: TensorDataset) -> None:
    x, y = data.tensors
    train = TensorDataset(x.bfloat16(), y)
    assert LastLayer.of(network().bfloat16(), train, train, damping=1.001e-7).damping.unique().tolist() == [1.001e-7]


def test_features_that_do_not_fit_are_refused(data: TensorDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_layer, "MOST_LAST_LAYER_FEATURES", N * 6)
    LastLayer.of(network(), data, data, damping=0.1)
    monkeypatch.setattr(last_layer, "MOST_LAST_LAYER_FEATURES", N * 6 - 1)
    with pytest.raises(ValueError, match="at most 359 features of the last layer to hold, got 360"):
        LastLayer.of(network(), data, data, damping=0.1)


def test_a_loss_that_is_not_convex_is_said(data: TensorDataset) -> None:
    task = Task(loss=lambda out, target: -1e3 * out.square().sum(1))
    last = LastLayer.of(network(), data, data, task, damping=1e-3)
    with pytest.raises(FloatingPointError, match="expected a loss that is convex in '3'"):
        last.retrain(range(10))
