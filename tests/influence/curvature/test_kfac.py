"""K-FAC against slow transcriptions, and against real retraining."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp import Task
from lightning_interp.data.samples import Samples
from lightning_interp.influence import KFAC, GaussNewton, InfluenceFunction
from lightning_interp.influence.curvature.ekfac import FittedEKFAC
from lightning_interp.influence.gradients.coverage import Coverage, find_coverage
from lightning_interp.influence.gradients.reader import Reader
from lightning_interp.network.undisturbed import differentiable

DATA = Path(__file__).parents[2] / "data"
DAMPING = 0.01


def fitted(net: nn.Module, train: TensorDataset, curvature: KFAC) -> tuple[Coverage, FittedEKFAC]:
    with differentiable(net):
        coverage = find_coverage(net, Task(kind="classes"), next(iter(DataLoader(train, 3))))
        return coverage, curvature.fit(Reader(coverage, 5), Samples(train, batch_size=5))


def solved(found: FittedEKFAC, block: str, grads: Tensor) -> Tensor:
    return found.inverse(dict.fromkeys(found.bases, DAMPING)).solved({block: grads})[block]


def expected(b: Tensor, a: Tensor, grads: Tensor) -> Tensor:
    """(B ⊗ A + λ)⁻¹ of one gradient `(o, i)`, the product written out."""
    matrix = torch.kron(b, a)
    matrix.diagonal().add_(DAMPING)
    return torch.linalg.solve(matrix, grads.flatten()).reshape(grads.shape)


def output_factor(net: nn.Module, train: TensorDataset, layer: nn.Module) -> Tensor:
    """(1/(nT)) Σ g gᵀ over samples, classes weighted by their probability, and positions."""
    total = torch.zeros((), dtype=torch.float64)
    for x, _ in train:
        held: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _, __, output, held=held: held.append(output))
        logits = net(x[None])
        handle.remove()
        for c, p in enumerate(logits[0].softmax(0).detach()):
            loss = F.cross_entropy(logits, torch.tensor([c]))
            (grad,) = torch.autograd.grad(loss, held, retain_graph=True)
            g = grad[0].T if isinstance(layer, nn.Embedding) else grad[0].reshape(grad.shape[1], -1)
            total = total + p * g @ g.T / g.shape[1]
    return total / len(train)


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    return net, TensorDataset(torch.randn(14, 32, dtype=torch.float64), torch.arange(14) % 3)


@pytest.mark.parametrize("columns", [None, 1000])
def test_linear_layer_equals_the_formula(small: tuple[nn.Module, TensorDataset], columns: int | None) -> None:
    net, train = small
    _, found = fitted(net, train, KFAC(columns))
    inputs = torch.cat([net[:4](train.tensors[0]).detach(), torch.ones(14, 1).double()], dim=1)
    grads = torch.randn(1, 1, 3, 17).double()
    wanted = expected(output_factor(net, train, net[4]), inputs.T @ inputs / 14, grads[0, 0])
    assert found.n == 14
    assert torch.allclose(solved(found, "4.weight", grads)[0, 0], wanted, rtol=1e-8)


@pytest.mark.parametrize("columns", [None, 1000])
def test_convolution_equals_the_formula_group_by_group(
    small: tuple[nn.Module, TensorDataset], columns: int | None
) -> None:
    net, train = small
    _, found = fitted(net, train, KFAC(columns))
    whole = output_factor(net, train, net[1])
    grads = torch.randn(1, 2, 2, 10).double()
    for group in range(2):
        patches = F.unfold(net[0](train.tensors[0])[:, group : group + 1], 3)
        patches = torch.cat([patches, torch.ones(14, 1, 4).double()], dim=1)
        a = torch.einsum("nit,njt->ij", patches, patches) / 14
        mine = slice(2 * group, 2 * group + 2)
        wanted = expected(whole[mine, mine], a, grads[0, group])
        assert torch.allclose(solved(found, "1.weight", grads)[0, group], wanted, rtol=1e-8), group


def test_a_table_equals_the_formula() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2)).double()
    tokens = torch.tensor([[0, 1], [2, 1], [4, 0], [1, 0]])
    train = TensorDataset(tokens, torch.tensor([0, 1, 1, 0]))
    coverage, found = fitted(net, train, KFAC(None))
    assert coverage.blocks["0.weight"].layout == "table"
    grads = torch.randn(1, 1, 4, 5).double()
    counts = torch.diag(torch.tensor([3, 3, 1, 0, 1]) / 4).double()
    wanted = expected(output_factor(net, train, net[0]), counts, grads[0, 0])
    assert torch.allclose(solved(found, "0.weight", grads)[0, 0], wanted, rtol=1e-8)


def test_a_side_that_is_too_wide_keeps_its_diagonal(
    small: tuple[nn.Module, TensorDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_interp.influence.curvature.kfac.WIDEST_FACTOR", 16)
    net, train = small
    _, found = fitted(net, train, KFAC(None))
    inputs = torch.cat([net[:4](train.tensors[0]).detach(), torch.ones(14, 1).double()], dim=1)
    grads = torch.randn(1, 1, 3, 17).double()
    a = torch.diag(inputs.square().mean(0))
    wanted = expected(output_factor(net, train, net[4]), a, grads[0, 0])
    assert torch.allclose(solved(found, "4.weight", grads)[0, 0], wanted, rtol=1e-8)


def test_it_is_exact_where_the_factors_are_independent() -> None:
    torch.manual_seed(0)
    net = nn.Linear(5, 2).double()
    train = TensorDataset(torch.randn(20, 5).double(), torch.randn(20, 2).double())
    whole = InfluenceFunction(GaussNewton(), DAMPING).fit(net, train)
    factored = InfluenceFunction(KFAC(None), DAMPING).fit(net, train)
    assert torch.allclose(factored(train).scores, whole(train).scores, rtol=1e-8)
    assert torch.allclose(factored.self_influence().scores, whole.self_influence().scores, rtol=1e-8)
    assert factored.fitted.mean_eigenvalue == pytest.approx(whole.fitted.mean_eigenvalue)


def test_it_ranks_subsets_of_a_real_network() -> None:
    digits, held = np.load(DATA / "digits_logistic_regression.npz"), np.load(DATA / "digits_mlp_subsets.npz")
    net = nn.Sequential()
    net.add_module("fc1", nn.Linear(64, 64))
    net.add_module("act", nn.ReLU())
    net.add_module("fc2", nn.Linear(64, 10))
    net.load_state_dict({k: torch.tensor(held[k]) for k in net.state_dict()})
    train, query = (TensorDataset(*(torch.tensor(digits[f"{part}_{k}"]) for k in "xy")) for part in ("train", "test"))
    found = InfluenceFunction(KFAC(512))(net, train, query)
    predicted = np.unpackbits(held["masks"], axis=1)[:, :1437] @ found.scores.double().numpy().T
    lds = np.mean([spearmanr(predicted[:, q], -held["loss"][:, q])[0] for q in range(100)])
    assert lds >= 0.70
    assert any("512 of its" in note for note in found.notes)


def test_samples_and_errors(small: tuple[nn.Module, TensorDataset]) -> None:
    _, found = fitted(*small, KFAC(None, samples=6))
    assert found.n == 6
    with pytest.raises(ValueError, match=r"KFAC\(columns=...\): expected a whole number from 1"):
        KFAC(columns=0)
