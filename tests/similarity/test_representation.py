"""A layer in each of its forms gives the same numbers, and products are exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from lightning_interp.similarity import CCA, CKA, PWCCA, SVCCA, Procrustes, RBFKernel, matrix, prepare
from lightning_interp.similarity.matrix import needs, similarity
from lightning_interp.similarity.representation import Form, Representation
from lightning_interp.similarity.symmetric_product import symmetric_product

ALL = [CKA(), CKA(debiased=True), CKA(RBFKernel()), SVCCA(0.9), CCA(), Procrustes()]


@pytest.mark.parametrize("n", [1, 2, 63, 64, 129, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_symmetric_product(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, 300, dtype=dtype)
    product = symmetric_product(x)
    assert torch.equal(product, product.T)
    assert torch.allclose(product, x @ x.T, rtol=1e-4 if dtype is torch.float32 else 1e-12, atol=1e-4)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_stay_in_full_precision_whatever_the_user_set(precision: str) -> None:
    x = torch.randn(128, 4096)
    exact = x.double() @ x.double().T
    torch.set_float32_matmul_precision(precision)
    try:
        product = symmetric_product(x)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert float((product.double() - exact).abs().max()) < 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("width", [5, 80, 700])
@pytest.mark.parametrize("form", ["gram", "scores"])
def test_what_is_kept_gives_the_same_numbers(width: int, form: Form) -> None:
    x = prepare(torch.randn(100, width, dtype=torch.float64) * torch.logspace(0, -1, width, dtype=torch.float64))
    y = prepare(x.values[:, : width // 2 + 1] + 0.3 * torch.randn(100, width // 2 + 1, dtype=torch.float64))
    for measure in ALL if form == "scores" else ALL[:3]:
        whole, kept = measure.between(x, y), measure.between(x.reduced(form), y.reduced(form))
        assert torch.allclose(whole, kept, atol=1e-6, equal_nan=True), measure


def test_small_layers_stay_features() -> None:
    forms = [prepare(torch.randn(100, width)).reduced("gram").form for width in (25, 26, 500)]
    assert forms == ["features", "gram", "gram"]
    forms = [prepare(torch.randn(100, width)).reduced("scores").form for width in (100, 101)]
    assert forms == ["features", "scores"]
    assert prepare(torch.randn(100, 500)).reduced("features").form == "features"


def test_half_precision_serves_cka_alone() -> None:
    x, y = (prepare(torch.randn(60, 500)).reduced("gram") for _ in range(2))
    half = Representation((x.gram / 100).half(), "gram", 500)
    for measure in (CKA(), CKA(debiased=True)):
        assert float(measure.between(half, y)) == pytest.approx(float(measure.between(x, y)), abs=2e-5)
    with pytest.raises(ValueError, match="expected one that gives singular vectors, got a Gram matrix in half"):
        SVCCA().between(half, y)


def test_shuffling_is_of_samples() -> None:
    order = torch.randperm(50)
    for x in (prepare(torch.randn(50, 8)), prepare(torch.randn(50, 90)).reduced("gram")):
        assert torch.allclose(x.shuffled(order).gram, x.gram[order][:, order], atol=1e-4)


def test_what_measures_need() -> None:
    assert needs([CKA(), CKA(debiased=True)]) == "gram"
    assert needs([CKA(), CKA(RBFKernel())]) == "scores"
    assert needs([CKA(), SVCCA()]) == "scores"
    assert needs([PWCCA(), CKA()]) == "features"
    assert needs([CKA(), torch.dist]) == "features"
    assert needs([torch.dist], compact=True) == "scores"


def test_functions_of_two_tensors() -> None:
    def overlap(x: Tensor, y: Tensor) -> Tensor:
        return (x[:, 0] * y[:, 0]).sum()

    x, y = torch.randn(20, 3), torch.randn(20, 3)
    assert matrix(overlap, [x], [y]).item() == pytest.approx(float(overlap(x, y)), rel=1e-6)
    assert similarity(overlap, prepare(x), prepare(torch.randn(20, 50)).reduced("scores")).isnan()
    assert matrix(PWCCA(), [x, y])[0, 1] != matrix(PWCCA(), [x, y])[1, 0], "the side that gives the weights counts"
    with pytest.raises(ValueError, match=r"features of the same samples, got \[20, 21\]"):
        matrix(CKA(), [x, torch.randn(21, 3)])


def test_rows_that_differ_are_not_compared() -> None:
    assert matrix(CKA(), [prepare(torch.randn(20, 3)), prepare(torch.randn(80, 3))]).isnan().tolist() == [
        [False, True],
        [True, False],
    ]


def test_canonical_directions(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    found = CCA().directions(x, y)
    assert float(found.correlations.mean()) == pytest.approx(0.990431, abs=1e-6)
    expected = np.cos(subspace_angles((x - x.mean(0)).numpy(), (y - y.mean(0)).numpy()))
    assert found.correlations.tolist() == pytest.approx(sorted(expected, reverse=True), abs=1e-9)
    assert torch.allclose((x - x.mean(0)) @ found.weights_x, found.variates_x, atol=1e-9)
    assert torch.allclose((y - y.mean(0)) @ found.weights_y, found.variates_y, atol=1e-9)
    across = found.variates_x.T @ found.variates_y
    assert torch.allclose(across, torch.diag(found.correlations), atol=1e-9)
    assert torch.allclose(found.variates_x.T @ found.variates_x, torch.eye(20, dtype=x.dtype), atol=1e-9)
    reduced = SVCCA(0.9).directions(x, y)
    assert len(reduced.correlations) == min(SVCCA(0.9).kept(prepare(z)) for z in pair)
    assert float(reduced.correlations.mean()) == pytest.approx(float(SVCCA(0.9)(x, y)), abs=1e-9)


@pytest.mark.parametrize("width", [60, 180, 900])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rank_is_that_of_what_was_computed(width: int, dtype: torch.dtype) -> None:
    """A product of 20 directions, rounded like a layer's output, has 20 and no direction of rounding."""
    x = torch.randn(200, 20, dtype=dtype) @ torch.randn(20, width, dtype=dtype) + 3
    assert prepare(x).rank == 20


def test_weak_directions_of_float32_features_count() -> None:
    """A direction of a hundred-thousandth of the strongest is far above rounding, and CCA sees it."""
    x = torch.randn(600, 30, dtype=torch.float64)
    x *= torch.logspace(0, -5, 30, dtype=torch.float64)
    y = x @ torch.randn(30, 12, dtype=torch.float64) + 0.1 * torch.randn(600, 12, dtype=torch.float64)
    assert prepare(x.float()).rank == 30
    assert float(CCA()(x.float(), y.float())) == pytest.approx(float(CCA()(x, y)), abs=1e-4)
