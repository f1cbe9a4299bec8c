"""Products with the Gauss–Newton matrix, and the solvers that need nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp import Task
from lightning_interp.data.samples import Samples
from lightning_interp.influence import EKFAC, KFAC, ConjugateGradient, Damping, GaussNewton, InfluenceFunction, LiSSA
from lightning_interp.influence.curvature.conjugate_gradient import solve
from lightning_interp.influence.curvature.lissa import largest_eigenvalue
from lightning_interp.influence.curvature.operator import Operator
from lightning_interp.influence.curvature.vectors import vector_jacobian_products
from lightning_interp.influence.gradients.coverage import find_coverage
from lightning_interp.influence.gradients.reader import Reader
from lightning_interp.network.undisturbed import differentiable
from tests.influence import naive
from tests.influence.nets import Loose, Reused, SequenceFirst, TiedTokens

DATA = Path(__file__).parents[2] / "data"
CLASSES = Task(kind="classes")


class Attending(nn.Module):
    """A transformer layer between a projection and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
        self.layer = nn.TransformerEncoderLayer(6, 2, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.project(x.unflatten(1, (3, 6)))).mean(1))


class Recurrent(nn.Module):
    """A GRU between a projection and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(3, 3), nn.Linear(4, 3)
        self.gru = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(self.project(x.unflatten(1, (6, 3))))[0][:, -1])


class PerPosition(nn.Module):
    """Classes at each of three positions."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.unflatten(1, (3, 6))).transpose(1, 2)


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tripled(outputs: Tensor, targets: Tensor) -> Tensor:
    return 3 * F.cross_entropy(outputs, targets, reduction="none")


def image_net() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 3, 3)), nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(3, 3),
    )  # fmt: skip


LABELS = torch.arange(9) % 3
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor, Task]] = {
    "images": (image_net, doubles(9, 18), LABELS, CLASSES),
    "called twice": (Reused, doubles(9, 6), LABELS, CLASSES),
    "outside layers": (Loose, doubles(9, 24), LABELS, CLASSES),
    "sequence first": (SequenceFirst, doubles(9, 18), LABELS, CLASSES),
    "tied table": (TiedTokens, torch.randint(0, 7, (9, 3)), LABELS, CLASSES),
    "attention": (Attending, doubles(9, 18), LABELS, CLASSES),
    "recurrent": (Recurrent, doubles(9, 18), LABELS, CLASSES),
    "classes at positions": (PerPosition, doubles(9, 18), torch.randint(0, 4, (9, 3)), CLASSES),
    "binary": (lambda: nn.Linear(5, 1), doubles(9, 5), LABELS % 2, Task(kind="binary")),
    "multilabel": (lambda: nn.Linear(5, 3), doubles(9, 5), torch.randint(0, 2, (9, 3)), Task(kind="multilabel")),
    "regression": (lambda: nn.Linear(5, 2), doubles(9, 5), doubles(9, 2), Task(kind="regression")),
    "a loss of one's own": (lambda: nn.Linear(5, 3), doubles(9, 5), LABELS, Task(loss=tripled)),
}


def operator(net: nn.Module, train: TensorDataset, task: Task) -> Operator:
    """The operator of what is covered of a network; the rest is frozen."""
    coverage = find_coverage(net, task, next(iter(DataLoader(train, 3))))
    for name in coverage.left_out:
        net.get_parameter(name).requires_grad_(False)
    return Operator.of(Reader(coverage, 4), Samples(train, batch_size=4))


@pytest.mark.parametrize("at_once", [2**22, 1])
@pytest.mark.parametrize("name", CASES)
def test_products_equal_the_matrix_written_out(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_interp.influence.curvature.operator.ELEMENTS_AT_ONCE", at_once)
    torch.manual_seed(0)
    make, x, y, task = CASES[name]
    net, train = make().double().eval(), TensorDataset(x, y)
    with differentiable(net):
        ours = operator(net, train, task)
        held = {n: p for n, p in net.named_parameters() if p.requires_grad}
        flat = doubles(5, sum(p.numel() for p in held.values()))

        def packed(vectors: Tensor) -> dict[str, Tensor]:
            parts = vectors.split([p.numel() for p in held.values()], dim=1)
            named = {n: part.reshape(5, *held[n].shape) for n, part in zip(held, parts, strict=True)}
            return ours.space.coverage.pack(named)

        shapes = ours.space.coverage.shapes
        shift = {block: doubles(*shape) if i % 2 else 0.5 for i, (block, shape) in enumerate(shapes.items())}
        plain = ours.space.blocks(ours(ours.space.joined(packed(flat))))
        found = ours.space.blocks(ours.damped(shift)(ours.space.joined(packed(flat))))
        expected = packed(flat @ naive.ggn(net, train, task))
    assert len(held) >= 2
    for block, wanted in expected.items():
        assert torch.allclose(plain[block], wanted, rtol=1e-8, atol=1e-12), block
        assert torch.allclose(found[block], wanted + shift[block] * packed(flat)[block], rtol=1e-8, atol=1e-12), block


class Choosy(torch.autograd.Function):
    """x ↦ x, whose backward looks at values, which a vectorised one cannot."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad if bool(grad.abs().sum() >= 0) else -grad


def test_what_cannot_be_vectorised_is_done_one_by_one() -> None:
    weight, other = doubles(4, 3).requires_grad_(), doubles(2).requires_grad_()
    vectors, x = doubles(6, 5, 3), doubles(5, 4)
    with pytest.raises(RuntimeError, match="is_nonzero"):
        torch.autograd.grad(Choosy.apply(x @ weight), weight, vectors, is_grads_batched=True)
    by_weight, by_other = vector_jacobian_products([Choosy.apply(x @ weight)], [weight, other], [vectors])
    assert torch.allclose(by_weight, torch.einsum("ni,qno->qio", x, vectors))
    assert by_other.shape == (6, 2)
    assert not by_other.any()


def test_what_depends_on_nothing_gives_zeros() -> None:
    weight = doubles(3).requires_grad_()
    (found,) = vector_jacobian_products([torch.ones(2)], [weight], [torch.ones(4, 2)])
    assert found.shape == (4, 3)
    assert not found.any()


Case = tuple[nn.Module, TensorDataset, TensorDataset]


@pytest.fixture(scope="module")
def small() -> Case:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    return net, TensorDataset(doubles(14, 32), torch.arange(14) % 3), TensorDataset(doubles(3, 32), torch.arange(3))


@pytest.mark.parametrize("preconditioner", [None, EKFAC(None), KFAC(8)])
def test_conjugate_gradients_end_at_the_solution(small: Case, preconditioner: EKFAC | KFAC | None) -> None:
    net, train, query = small
    values = {name: torch.rand_like(p) + 0.01 for name, p in net.named_parameters()}
    solver = ConjugateGradient(100, 1e-10, preconditioner)
    found = InfluenceFunction(solver, Damping(values, "test"))(net, train, query)
    added = torch.cat([values[name].flatten() for name, _ in net.named_parameters()])
    matrix = naive.ggn(net, train, CLASSES) + added.diag()
    expected = naive.scores(matrix, net, train, query, CLASSES)
    assert torch.allclose(found.scores, expected, rtol=1e-7, atol=1e-12)
    assert found.curvature_n == 14
    assert any("conjugate gradient: relative residual" in note and "above" not in note for note in found.notes)


def test_the_residual_is_the_solutions_own_and_an_unsolved_system_is_said_to_be(small: Case) -> None:
    net, train, query = small
    fitted = InfluenceFunction(ConjugateGradient(2, 1e-3, EKFAC(None)), 0.001).fit(net, train)
    with differentiable(net):
        rows = next(fitted.reader.per_sample_gradients(Samples(query), "queries")).loss_gradients()
        scorer = fitted.inverse.against(rows)
    blocks = fitted.coverage.blocks
    named = [blocks[name].unpack(vectors) for name, vectors in scorer.solutions.items()]
    flat = {name: value for part in named for name, value in part.items()}
    vectors = torch.cat([flat[name].flatten(1) for name, _ in net.named_parameters()], dim=1)
    right = naive.gradients(net, query, CLASSES)
    rest = right - vectors @ naive.ggn(net, train, CLASSES) - 0.001 * vectors
    expected = rest.norm(dim=1) / right.norm(dim=1)
    assert float(expected.min()) > 1e-3
    assert torch.allclose(scorer.residuals, expected, rtol=1e-6)
    assert f"{float(expected.max()):.1e}" in scorer.notes[0]
    assert "after 2 iterations: 3 of 3 queries are above 0.001" in scorer.notes[0]
    assert scorer.notes[0] in fitted(query).notes


def test_preconditioned_conjugate_gradients_rank_subsets_of_a_real_network_after_three_iterations() -> None:
    digits, held = np.load(DATA / "digits_logistic_regression.npz"), np.load(DATA / "digits_mlp_subsets.npz")
    net = nn.Sequential()
    net.add_module("fc1", nn.Linear(64, 64))
    net.add_module("act", nn.ReLU())
    net.add_module("fc2", nn.Linear(64, 10))
    net.load_state_dict({k: torch.tensor(held[k]) for k in net.state_dict()})
    train, query = (TensorDataset(*(torch.tensor(digits[f"{part}_{k}"]) for k in "xy")) for part in ("train", "test"))
    masks = np.unpackbits(held["masks"], axis=1)[:, :1437]

    def lds(preconditioner: EKFAC | None) -> float:
        found = InfluenceFunction(ConjugateGradient(3, 1e-3, preconditioner), 0.0097)(net, train, query)
        predicted = masks @ found.scores.double().numpy().T
        return float(np.mean([spearmanr(predicted[:, q], -held["loss"][:, q])[0] for q in range(100)]))

    assert lds(EKFAC(512)) >= 0.80
    assert lds(None) < 0.60


def test_single_precision_claims_no_more_than_it_has() -> None:
    torch.manual_seed(0)
    root = torch.randn(40, 40)
    matrix = root @ root.T / 40 + 0.001 * torch.eye(40)
    right = torch.randn(3, 40)
    found = solve(lambda v: v @ matrix, right, torch.clone, 400, 1e-12)
    true = (right.double() - found.vectors.double() @ matrix.double()).norm(dim=1) / right.double().norm(dim=1)
    assert float(true.min()) > 1e-8
    assert torch.allclose(found.residuals.double(), true, rtol=0.5)
    assert "above 1e-12" in found.notes[0]


def test_systems_end_on_their_own_and_zero_is_solved_by_zero() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2, 3, 4], dtype=torch.float64))
    right = torch.tensor([[0.0, 0, 0, 0], [0, 5, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
    widths = []

    def product(vectors: Tensor) -> Tensor:
        widths.append(len(vectors))
        return vectors @ matrix

    found = solve(product, right, torch.clone, 10, 1e-6)
    assert torch.allclose(found.vectors, right / matrix.diagonal())
    assert widths[:2] == [2, 1]
    assert float(found.residuals[0]) == 0


def test_an_indefinite_matrix_is_an_error() -> None:
    with pytest.raises(FloatingPointError, match="not positive definite"):
        solve(lambda v: -v, torch.ones(1, 3), torch.clone, 3, 0.1)
    with pytest.raises(FloatingPointError, match="not positive definite"):
        solve(lambda v: v * torch.nan, torch.ones(1, 3), torch.clone, 3, 0.1)


def test_fewer_samples_are_another_matrix(small: Case) -> None:
    net, train, query = small
    some = TensorDataset(*(part[[0, 4, 9, 13]] for part in train.tensors))
    found = InfluenceFunction(ConjugateGradient(100, 1e-10, None, samples=4), 0.1)(net, train, query)
    matrix = naive.ggn(net, some, CLASSES)
    expected = naive.scores(matrix + 0.1 * torch.eye(len(matrix)), net, train, query, CLASSES)
    assert torch.allclose(found.scores, expected, rtol=1e-7, atol=1e-12)
    assert found.curvature_n == 4


def test_the_mean_eigenvalue_is_the_matrixs_own(small: Case) -> None:
    net, train, _ = small
    expected = float(naive.ggn(net, train, CLASSES).diagonal().mean())
    for kind in (ConjugateGradient(preconditioner=None), ConjugateGradient(preconditioner=EKFAC(None)), LiSSA(1)):
        fitted = InfluenceFunction(kind).fit(net, train)
        assert fitted.fitted.mean_eigenvalue == pytest.approx(expected)
        assert fitted.damping.typical == pytest.approx(expected / 10)


@pytest.mark.parametrize("curvature", [ConjugateGradient(), LiSSA()])
def test_self_influence_is_refused_with_advice(small: Case, curvature: ConjugateGradient | LiSSA) -> None:
    net, train, _ = small
    fitted = InfluenceFunction(curvature, 0.1).fit(net, train)
    with pytest.raises(ValueError, match=r"one system for each training sample.*EKFAC\(\) or GaussNewton"):
        fitted.self_influence()


def test_the_whole_series_is_the_inverse(small: Case) -> None:
    net, train, query = small
    found = InfluenceFunction(LiSSA(150, batch_size=14), 0.3)(net, train, query)
    expected = InfluenceFunction(GaussNewton(), 0.3)(net, train, query)
    assert torch.allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-9)
    assert any("LiSSA: relative residual" in note for note in found.notes)


def test_mini_batches_scatter_around_the_inverse_and_repeats_narrow_it(small: Case) -> None:
    net, train, query = small
    expected = InfluenceFunction(GaussNewton(), 0.3)(net, train, query).scores
    one, again, many = (
        InfluenceFunction(LiSSA(30, repeats, batch_size=5, seed=1), 0.3)(net, train, query).scores
        for repeats in (1, 1, 8)
    )
    assert torch.equal(one, again)
    assert float((one - expected).norm() / expected.norm()) < 0.4
    assert float((many - expected).norm()) < 0.6 * float((one - expected).norm())


def test_the_scale_is_the_largest_eigenvalue(small: Case) -> None:
    net, train, _ = small
    with differentiable(net):
        ours = operator(net, train, CLASSES)
        found = largest_eigenvalue(ours, 14, torch.Generator().manual_seed(0))
    assert found == pytest.approx(float(torch.linalg.eigvalsh(naive.ggn(net, train, CLASSES))[-1]), rel=0.05)


def test_a_diverging_series_is_an_error_that_names_the_scale(small: Case) -> None:
    net, train, query = small
    with pytest.raises(FloatingPointError, match=r"LiSSA\(scale=0.01\): the series diverged at step"):
        InfluenceFunction(LiSSA(500, scale=0.01), 0.1)(net, train, query)


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"ConjugateGradient\(iterations=...\): expected a whole number from 1"):
        ConjugateGradient(0)
    with pytest.raises(ValueError, match=r"ConjugateGradient\(tolerance=...\): expected 0 < tolerance < 1, got 1.0"):
        ConjugateGradient(tolerance=1.0)
    with pytest.raises(ValueError, match=r"LiSSA\(repeats=...\): expected a whole number from 1"):
        LiSSA(repeats=0)
    with pytest.raises(ValueError, match=r"LiSSA\(scale=...\): expected a positive number or None, got -1.0"):
        LiSSA(scale=-1.0)
