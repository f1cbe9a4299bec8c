"""Influence against real retraining, and curvature against slow transcriptions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_interp import Task
from lightning_interp.data.samples import Samples
from lightning_interp.influence import EKFAC, Damping, GaussNewton, IdentityCurvature, InfluenceFunction
from lightning_interp.influence.curvature import Curvature
from lightning_interp.influence.estimators.fitted import FittedInfluence
from lightning_interp.influence.gradients.coverage import find_coverage
from lightning_interp.influence.gradients.factored import FactoredGradients, dot_products
from lightning_interp.influence.gradients.per_sample import PerSampleGradients
from lightning_interp.influence.gradients.reader import Reader
from lightning_interp.network.undisturbed import differentiable

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def digits() -> tuple[TensorDataset, TensorDataset]:
    held = np.load(DATA / "digits_logistic_regression.npz")
    train_x, train_y, test_x, test_y = (torch.tensor(held[k]) for k in ("train_x", "train_y", "test_x", "test_y"))
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    train = TensorDataset(torch.randn(14, 32, dtype=torch.float64), torch.arange(14) % 3)
    return net, train, TensorDataset(torch.randn(2, 32, dtype=torch.float64), torch.tensor([0, 2]))


def test_exact_influence_predicts_leave_one_out_retraining(digits: tuple[TensorDataset, TensorDataset]) -> None:
    held = np.load(DATA / "digits_logistic_regression.npz")
    net = nn.Linear(64, 10).double()
    weights = torch.tensor(held["weights"])
    net.load_state_dict({"weight": weights[:, :64], "bias": weights[:, 64]})
    train, query = (TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in digits)
    estimator = InfluenceFunction(GaussNewton(), damping=float(held["regularisation"]))
    found = estimator(net, train, query)
    predicted, actual = found.scores.numpy().ravel(), held["leave_one_out"].T.ravel()
    assert pearsonr(predicted, actual)[0] >= 0.994
    assert spearmanr(predicted, actual)[0] >= 0.997
    assert np.polyfit(predicted, actual, 1)[0] == pytest.approx(1.18, abs=0.01)
    assert found.coverage == 1
    assert found.left_out == {}


def test_leverage_makes_the_sizes_right(digits: tuple[TensorDataset, TensorDataset]) -> None:
    held = np.load(DATA / "digits_logistic_regression.npz")
    net = nn.Linear(64, 10).double()
    weights = torch.tensor(held["weights"])
    net.load_state_dict({"weight": weights[:, :64], "bias": weights[:, 64]})
    train, query = (TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in digits)
    estimator = InfluenceFunction(GaussNewton(), float(held["regularisation"]), leverage=True)
    predicted = estimator(net, train, query).scores.numpy().ravel()
    actual = held["leave_one_out"].T.ravel()
    assert pearsonr(predicted, actual)[0] >= 0.994
    assert np.polyfit(predicted, actual, 1)[0] == pytest.approx(1.055, abs=0.005)


@pytest.mark.parametrize("curvature", [GaussNewton(), GaussNewton(1000)])
def test_leverage_equals_the_formula(
    small: tuple[nn.Module, TensorDataset, TensorDataset], curvature: GaussNewton
) -> None:
    net, train, query = small
    found = InfluenceFunction(curvature, damping=0.1, leverage=True)(net, train, query)
    whole = naive_ggn(net, train) + 0.1 * torch.eye(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    query_grads = torch.stack([naive_gradient(net, x, y) for x, y in query])
    for place in range(len(train)):
        x, y = train[place]
        without = whole - naive_ggn(net, TensorDataset(x[None], y[None])) / len(train)
        expected = query_grads @ torch.linalg.solve(without, naive_gradient(net, x, y)) / len(train)
        assert torch.allclose(found.scores[:, place], expected, rtol=1e-7, atol=1e-12), place


def test_ekfac_ranks_subsets_of_a_real_network(digits: tuple[TensorDataset, TensorDataset]) -> None:
    held = np.load(DATA / "digits_mlp_subsets.npz")
    net = nn.Sequential()
    net.add_module("fc1", nn.Linear(64, 64))
    net.add_module("act", nn.ReLU())
    net.add_module("fc2", nn.Linear(64, 10))
    net.load_state_dict({k: torch.tensor(held[k]) for k in net.state_dict()})
    found = InfluenceFunction()(net, *digits)
    masks = np.unpackbits(held["masks"], axis=1)[:, :1437]
    predicted = masks @ found.scores.double().numpy().T
    lds = np.mean([spearmanr(predicted[:, q], -held["loss"][:, q])[0] for q in range(100)])
    assert lds >= 0.70


def naive_ggn(net: nn.Module, data: TensorDataset) -> Tensor:
    """(1/n) Σ Jᵀ (diag p − p pᵀ) J over all parameters, one output at a time."""
    total = 0
    for x, _ in data:
        logits = net(x[None])[0]
        rows = [torch.autograd.grad(o, list(net.parameters()), retain_graph=True) for o in logits]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        p = logits.softmax(0).detach()
        total = total + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return total / len(data)


def naive_gradient(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    grads = torch.autograd.grad(F.cross_entropy(net(x[None]), y[None]), list(net.parameters()))
    return torch.cat([g.flatten() for g in grads])


def test_gauss_newton_equals_the_formula(small: tuple[nn.Module, TensorDataset, TensorDataset]) -> None:
    net, train, query = small
    found = InfluenceFunction(GaussNewton(), damping=0.01)(net, train, query)
    matrix = naive_ggn(net, train) + 0.01 * torch.eye(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    train_grads = torch.stack([naive_gradient(net, x, y) for x, y in train])
    query_grads = torch.stack([naive_gradient(net, x, y) for x, y in query])
    expected = query_grads @ torch.linalg.solve(matrix, train_grads.T) / len(train)
    assert found.scores.dtype is torch.float64
    assert torch.allclose(found.scores, expected, rtol=1e-9, atol=1e-12)
    assert found.gradient_norm == pytest.approx(float(train_grads.mean(0).norm()), rel=1e-5)


def naive_ekfac(net: nn.Module, data: TensorDataset, layer: nn.Module, damping: float, grads: Tensor) -> Tensor:
    """Kronecker eigenbasis and second moments of one layer, sample by sample and class by class."""
    pseudo: list[Tensor] = []
    weight, bias = layer.parameters()
    for x, _ in data:
        logits = net(x[None])[0]
        p = logits.softmax(0).detach()
        for c in range(3):
            vector = p[c].sqrt() * (F.one_hot(torch.tensor(c), 3) - p)
            w, b = torch.autograd.grad(logits, [weight, bias], vector, retain_graph=True)
            pseudo.append(torch.cat([w.flatten(1), b[:, None]], dim=1))
    u_a = torch.linalg.eigh(sum(g.T @ g for g in pseudo))[1]
    u_b = torch.linalg.eigh(sum(g @ g.T for g in pseudo))[1]
    moments = sum((u_b.T @ g @ u_a) ** 2 for g in pseudo) / len(data)
    return u_b @ ((u_b.T @ grads @ u_a) / (moments + damping)) @ u_a.T


@pytest.mark.parametrize("columns", [None, 1000])
def test_ekfac_equals_the_formula(small: tuple[nn.Module, TensorDataset, TensorDataset], columns: int | None) -> None:
    net, train, _ = small
    with differentiable(net):
        coverage = find_coverage(net, Task(kind="classes"), next(iter(DataLoader(train, 3))))
        fitted = EKFAC(columns).fit(Reader(coverage, 5), Samples(train, batch_size=5))
    assert fitted.n == len(train)
    inverse = fitted.inverse(dict.fromkeys(coverage.blocks, 0.01))
    for name, block in coverage.blocks.items():
        grads = torch.randn(1, *block.shape, dtype=torch.float64)
        layer = net.get_submodule(name.split(".")[0])
        expected = naive_ekfac(net, train, layer, 0.01, grads[0, 0])
        solved = inverse.bases[name].back(inverse.bases[name].rotate(grads) / inverse.eigenvalues[name])
        assert torch.allclose(solved[0, 0], expected, rtol=1e-6), name


def test_candidates_are_scored_as_in_the_whole(small: tuple[nn.Module, TensorDataset, TensorDataset]) -> None:
    net, train, query = small
    whole = InfluenceFunction(GaussNewton(), damping=0.1)(net, train, query)
    some = InfluenceFunction(GaussNewton(), damping=0.1)(net, train, query, candidates=[3, 11])
    assert torch.allclose(some.scores, whole.scores[:, [3, 11]])
    assert some.train_ids.tolist() == [3, 11]
    assert "2 of 14 training samples" in some.notes[0]


def test_order_is_the_datasets_own(small: tuple[nn.Module, TensorDataset, TensorDataset]) -> None:
    net, train, query = small
    estimator = InfluenceFunction(damping=0.1)
    expected = estimator(net, train, query).scores
    shuffled = DataLoader(train, 4, shuffle=True)
    assert torch.allclose(estimator(net, shuffled, query).scores, expected)
    backwards = estimator(net, Subset(train, list(range(13, -1, -1))), query)
    assert backwards.train_ids.tolist() == list(range(13, -1, -1))
    assert torch.allclose(backwards.scores.flip(1), expected, rtol=1e-4, atol=1e-9)


def test_helpful_harmful_and_surprising(small: tuple[nn.Module, TensorDataset, TensorDataset]) -> None:
    net, train, query = small
    found = InfluenceFunction(damping=0.1)(net, train, query)
    order = found.scores[0].argsort(descending=True)
    indices, scores = found.helpful(3)
    assert indices[0].tolist() == order[:3].tolist()
    assert scores[0].tolist() == found.scores[0][order[:3]].tolist()
    indices, scores = found.harmful(2)
    assert indices[0].tolist() == order.flip(0)[:2].tolist()
    assert bool((scores[:, 0] <= scores[:, 1]).all())
    indices, _ = found.surprising(4)
    for row, label in zip(indices, query.tensors[1], strict=True):
        assert all(train.tensors[1][i] != label for i in row)
    with pytest.raises(ValueError, match="0 to 14"):
        found.helpful(15)
    with pytest.raises(ValueError, match="k at most"):
        found.surprising(13)


def test_a_duplicate_of_the_query_helps_it() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(30, 4), torch.arange(30) % 2
    net = nn.Linear(4, 2)
    found = InfluenceFunction(GaussNewton(), damping=0.1)(net, TensorDataset(x, y), TensorDataset(x[:1], y[:1]))
    assert float(found.scores[0, 0]) > 0
    flipped = InfluenceFunction(GaussNewton(), damping=0.1)(net, TensorDataset(x, y), TensorDataset(x[:1], 1 - y[:1]))
    assert float(flipped.scores[0, 0]) < 0


def test_tables_and_normalisations_enter() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 2))
    data = TensorDataset(torch.randint(0, 5, (12, 2)), torch.arange(12) % 2)
    found = InfluenceFunction()(net, data, data)
    assert found.covered == ("0.weight", "2.weight", "2.bias", "3.weight", "3.bias")
    assert found.left_out == {}
    assert found.coverage == 1


def test_microbatches_change_nothing(
    small: tuple[nn.Module, TensorDataset, TensorDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, train, query = small
    expected = InfluenceFunction()(net, train, query).scores
    monkeypatch.setattr("lightning_interp.influence.gradients.reader.ELEMENTS_AT_ONCE", 1)
    assert torch.allclose(InfluenceFunction()(net, train, query).scores, expected, rtol=1e-4, atol=1e-10)


def test_errors_are_named(small: tuple[nn.Module, TensorDataset, TensorDataset]) -> None:
    net, train, query = small
    with pytest.raises(ValueError, match="positive number"):
        InfluenceFunction(damping=0.0)
    with pytest.raises(ValueError, match="whole number from 1"):
        EKFAC(samples=0)
    with pytest.raises(ValueError, match="samples in both, got 0 and 2"):
        InfluenceFunction()(net, Subset(train, []), query)
    frozen = nn.Linear(32, 3).double().requires_grad_(False)
    with pytest.raises(ValueError, match="no trained parameters"):
        InfluenceFunction()(frozen, train, query)
    big = nn.Linear(32, 300).double()
    with pytest.raises(ValueError, match="at most 8192"):
        InfluenceFunction(GaussNewton())(big, train, query)
    with pytest.raises(ValueError, match="one loss per sample"):
        InfluenceFunction()(net, train, query, task=Task(loss=F.cross_entropy))
    saturated = nn.Linear(32, 3).double()
    nn.init.constant_(saturated.weight, 0)
    saturated.bias.data = torch.tensor([1e4, 0.0, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="softmax saturated"):
        InfluenceFunction()(saturated, train, query)
    nn.init.constant_(big.weight, torch.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        InfluenceFunction()(big, train, query)


@pytest.mark.parametrize("most_solved", [0, 2**25], ids=["columns", "vectors"])
@pytest.mark.parametrize("own", [False, True], ids=["one damping", "one per parameter"])
def test_columns_give_the_whole_matrix_where_all_are_kept(
    small: tuple[nn.Module, TensorDataset, TensorDataset], most_solved: int, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_interp.influence.curvature.gauss_newton.LARGEST_SOLUTION", most_solved)
    net, train, query = small
    each = {name: torch.rand_like(p) * 0.01 + 0.01 for name, p in net.named_parameters()}
    damping = Damping(each, "test") if own else 0.01
    whole = InfluenceFunction(GaussNewton(), damping=damping).fit(net, train)
    columns = InfluenceFunction(GaussNewton(columns=1000), damping=damping).fit(net, train)
    solved = torch.cat([part.flatten(1) for part in columns.inverse.solve(rows_of(columns, query)).values()], dim=1)
    gradients = torch.cat([part.gradients().flatten(1) for part in rows_of(columns, train).values()], dim=1)
    assert torch.allclose(solved @ gradients.T / len(train), whole(query).scores, rtol=1e-8, atol=1e-12)
    assert columns.notes == ()
    assert torch.allclose(columns(query).scores, whole(query).scores, rtol=1e-8, atol=1e-12)
    assert torch.allclose(columns.self_influence().scores, whole.self_influence().scores, rtol=1e-8)
    assert columns.fitted.mean_eigenvalue == pytest.approx(whole.fitted.mean_eigenvalue)


def rows_of(fitted: FittedInfluence, data: TensorDataset) -> dict[str, FactoredGradients]:
    with differentiable(fitted.coverage.model):
        return PerSampleGradients(
            fitted.coverage.watched_model, next(iter(DataLoader(data, len(data))))
        ).loss_gradients()


def test_many_training_samples_meet_solved_queries_and_few_queries_no_columns(
    small: tuple[nn.Module, TensorDataset, TensorDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, train, query = small
    fitted = InfluenceFunction(GaussNewton(columns=1000), damping=0.01).fit(net, train)
    score = fitted.inverse.against(rows_of(fitted, query))
    rows = rows_of(fitted, train)
    expected = score(rows)

    def slow(*_: object) -> Tensor:
        raise AssertionError("28 columns are multiplied with, where 2 queries would do")

    monkeypatch.setattr("lightning_interp.influence.curvature.gauss_newton.dot_products", slow)
    assert torch.equal(score(rows), expected)


def test_sampled_columns_are_said_to_be_a_sample(small: tuple[nn.Module, TensorDataset, TensorDataset]) -> None:
    net, train, query = small
    found = InfluenceFunction(GaussNewton(columns=12), damping=0.01)(net, train, query)
    assert any("12 of its 28 columns" in note for note in found.notes)


@pytest.mark.parametrize("curvature", [EKFAC(None), GaussNewton(), GaussNewton(1000), IdentityCurvature()])
def test_self_influence_is_the_score_of_a_sample_for_itself(
    small: tuple[nn.Module, TensorDataset, TensorDataset], curvature: EKFAC
) -> None:
    net, train, _ = small
    fitted = InfluenceFunction(curvature, damping=0.1).fit(net, train)
    assert torch.allclose(fitted.self_influence().scores, fitted(train).scores.diagonal(), rtol=1e-8)


@pytest.mark.parametrize("curvature", [GaussNewton(), GaussNewton(1000)])
def test_damping_per_parameter_equals_the_formula(
    small: tuple[nn.Module, TensorDataset, TensorDataset], curvature: GaussNewton
) -> None:
    net, train, query = small
    values = {name: torch.rand_like(p) + 0.01 for name, p in net.named_parameters()}
    found = InfluenceFunction(curvature, damping=Damping(values, "test"))(net, train, query)
    added = torch.cat([values[name].flatten() for name, _ in net.named_parameters()])
    train_grads = torch.stack([naive_gradient(net, x, y) for x, y in train])
    query_grads = torch.stack([naive_gradient(net, x, y) for x, y in query])
    expected = query_grads @ torch.linalg.solve(naive_ggn(net, train) + added.diag(), train_grads.T) / len(train)
    assert torch.allclose(found.scores, expected, rtol=1e-8, atol=1e-12)


def test_the_identity_gives_dot_products(small: tuple[nn.Module, TensorDataset, TensorDataset]) -> None:
    net, train, query = small
    found = InfluenceFunction(IdentityCurvature(), damping=1.0)(net, train, query)
    train_grads = torch.stack([naive_gradient(net, x, y) for x, y in train])
    query_grads = torch.stack([naive_gradient(net, x, y) for x, y in query])
    assert torch.allclose(found.scores, query_grads @ train_grads.T / len(train), rtol=1e-9)


def test_products_agree_in_either_order() -> None:
    torch.manual_seed(0)
    for positions in (1, 2, 7):
        left, right = (
            FactoredGradients(torch.randn(n, 2, positions, 9), torch.randn(n, 2, positions, 8)) for n in (4, 5)
        )
        expected = left.gradients().flatten(1) @ right.gradients().flatten(1).T
        assert torch.allclose(dot_products(left, right), expected, atol=1e-4), positions
    whole = left.as_vectors(), right.as_vectors()
    assert torch.allclose(dot_products(*whole), expected, atol=1e-4)
    assert torch.equal(whole[0].gradients(), left.gradients().flatten(1)[:, None, :, None])


def test_the_choice_goes_by_what_columns_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 3))  # factors 33 + 20 + 21 + 3, gradients 660 + 63
    train = TensorDataset(torch.randn(14, 32), torch.arange(14) % 3)
    each = Damping({name: torch.rand_like(p) + 0.1 for name, p in net.named_parameters()}, "test")

    def default(damping: float | Damping | None) -> Curvature:
        return InfluenceFunction(damping=damping).prepare(net, train).curvature

    prepared = InfluenceFunction(damping=each).prepare(net, train)
    assert prepared.curvature == GaussNewton()
    assert "723 parameters is small" in prepared.reason
    monkeypatch.setattr("lightning_interp.influence.estimators.default_curvature.SMALL", 722)
    monkeypatch.setattr("lightning_interp.influence.estimators.default_curvature.STORED", 77 * 600)
    assert default(0.1) == GaussNewton(columns=600)
    assert isinstance(default(each), EKFAC)
    monkeypatch.setattr("lightning_interp.influence.estimators.default_curvature.STORED", 723 * 1024)
    assert default(each) == GaussNewton(columns=1024)
    assert isinstance(default(None), EKFAC)
    given = InfluenceFunction(GaussNewton(7)).prepare(net, train)
    assert (given.curvature, given.reason) == (GaussNewton(7), "")
