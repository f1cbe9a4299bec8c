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
from lightning_interp.capture import differentiable
from lightning_interp.influence import EKFAC, GaussNewton, InfluenceFunction
from lightning_interp.influence.curvature.loss import hessian_root
from lightning_interp.influence.gradients import Trace, layers_of

DATA = Path(__file__).parents[1] / "data"


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
    n = len(data)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    pseudo: list[Tensor] = []

    def hook(_: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            patches = F.unfold(given[0], layer.kernel_size, padding=layer.padding, stride=layer.stride)[0].T
        else:
            patches = given[0]
        inputs.append(torch.cat([patches, torch.ones(len(patches), 1, dtype=patches.dtype)], dim=1).detach())
        outputs.append(out)

    handle = layer.register_forward_hook(hook)
    a, b = 0, 0
    for x, _ in data:
        logits = net(x[None])[0]
        p = logits.softmax(0).detach()
        a = a + inputs[-1].T @ inputs[-1]
        for c in range(3):
            vector = p[c].sqrt() * (F.one_hot(torch.tensor(c), 3) - p)
            (g,) = torch.autograd.grad(logits, outputs[-1], vector, retain_graph=True)
            g = g[0].flatten(1).T if isinstance(layer, nn.Conv2d) else g
            b = b + g.T @ g
            pseudo.append(g.T @ inputs[-1])
    handle.remove()
    u_a, u_b = torch.linalg.eigh(a)[1], torch.linalg.eigh(b)[1]
    moments = sum((u_b.T @ g @ u_a) ** 2 for g in pseudo) / n
    return u_b @ ((u_b.T @ grads @ u_a) / (moments + damping)) @ u_a.T


def test_ekfac_equals_the_formula(small: tuple[nn.Module, TensorDataset, TensorDataset]) -> None:
    net, train, _ = small
    layers = layers_of(net)
    with differentiable(net):
        loader = DataLoader(train, 5)
        fitted = EKFAC().fit(lambda _: (Trace(net, layers, Task(), b) for b in loader), Task())
        for layer in layers:
            part = net.get_submodule(layer)
            shape = fitted.eigenvalues[layer].shape
            grads = torch.randn(1, *shape, dtype=torch.float64)
            expected = naive_ekfac(net, train, part, 0.01, grads[0, 0])
            assert torch.allclose(fitted.solve({layer: grads}, 0.01)[layer][0, 0], expected, rtol=1e-6), layer
    assert fitted.n == len(train)


@pytest.mark.parametrize("kind", ["classes", "binary", "squeezed", "multilabel", "regression"])
def test_hessian_root_is_the_hessian_of_the_loss(kind: str) -> None:
    outputs = torch.randn(4, 1 if kind == "binary" else 3, dtype=torch.float64)
    outputs = outputs[:, 0] if kind == "squeezed" else outputs
    targets = {
        "classes": torch.tensor([0, 1, 2, 1]),
        "binary": torch.tensor([0, 1, 1, 0]),
        "squeezed": torch.tensor([0, 1, 1, 0]),
        "multilabel": torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 0, 0]]),
        "regression": torch.randn(4, 3, dtype=torch.float64),
    }[kind]
    root = hessian_root(outputs, targets, Task())
    for sample in range(4):
        one = slice(sample, sample + 1)
        expected = torch.autograd.functional.hessian(
            lambda o, one=one: Task().loss(o[None], targets[one]).sum(), outputs[sample]
        )
        assert torch.allclose(root[sample] @ root[sample].T, expected.reshape(root.shape[1], -1), atol=1e-10)


def test_many_classes_are_mixed_without_bias() -> None:
    logits, targets = torch.randn(1, 70, dtype=torch.float64).expand(20_000, -1), torch.zeros(20_000).long()
    root = hessian_root(logits, targets, Task())
    assert root.shape == (20_000, 70, 8)
    p = logits[0].softmax(0)
    expected = torch.diag(p) - torch.outer(p, p)
    mean = torch.einsum("nik,njk->ij", root, root) / len(root)
    assert float((mean - expected).norm() / expected.norm()) < 0.02


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


def test_what_is_not_covered_is_named() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 2))
    data = TensorDataset(torch.randint(0, 5, (12, 2)), torch.arange(12) % 2)
    found = InfluenceFunction()(net, data, data)
    assert found.covered == ("3.weight", "3.bias")
    assert found.left_out == {"0.weight": 20, "2.weight": 8, "2.bias": 8}
    assert found.coverage == pytest.approx(18 / 54)


def test_microbatches_change_nothing(
    small: tuple[nn.Module, TensorDataset, TensorDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, train, query = small
    expected = InfluenceFunction()(net, train, query).scores
    monkeypatch.setattr("lightning_interp.influence.estimator.ELEMENTS_AT_ONCE", 1)
    assert torch.allclose(InfluenceFunction()(net, train, query).scores, expected, rtol=1e-4, atol=1e-10)


def test_errors_are_named(small: tuple[nn.Module, TensorDataset, TensorDataset]) -> None:
    net, train, query = small
    with pytest.raises(ValueError, match="positive number"):
        InfluenceFunction(damping=0.0)
    with pytest.raises(ValueError, match="at least 1 or None"):
        EKFAC(samples=0)
    with pytest.raises(ValueError, match="samples in both, got 0 and 2"):
        InfluenceFunction()(net, Subset(train, []), query)
    with pytest.raises(ValueError, match="linear or convolutional layers"):
        InfluenceFunction()(nn.Embedding(3, 3), train, query)
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


def test_too_many_outputs_are_named() -> None:
    dense = nn.Sequential(nn.Linear(4, 600), nn.Unflatten(1, (600, 1)))
    data = TensorDataset(torch.randn(6, 4), torch.randn(6, 600, 1))
    with pytest.raises(ValueError, match="at most 512 numbers per sample"):
        InfluenceFunction().check(dense, data)


def test_many_labels_are_exact_and_not_called_mixtures() -> None:
    data = TensorDataset(torch.randn(12, 4), (torch.rand(12, 80) > 0.5).float())
    found = InfluenceFunction()(nn.Linear(4, 80), data, data)
    assert not any("mixtures" in note for note in found.notes)
    classes = TensorDataset(torch.randn(12, 4), torch.arange(12))
    assert any("mixtures" in note for note in InfluenceFunction()(nn.Linear(4, 80), classes, classes).notes)
