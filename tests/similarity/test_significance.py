"""Null values, standard errors and streams against the slow way."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_interp.similarity import (
    CCA,
    CKA,
    PWCCA,
    SVCCA,
    Procrustes,
    RBFKernel,
    StreamingCKA,
    chance,
    cka_null,
    cka_standard_error,
    from_gram,
    permutation_null,
    prepare,
    r_squared_null,
    standard_error,
)
from lightning_interp.similarity.cka import cka_without_each
from lightning_interp.similarity.history import with_reliability
from lightning_interp.similarity.matrix import matrix, needs
from lightning_interp.similarity.pooling import fit_mask
from lightning_interp.similarity.representation import Representation
from lightning_interp.similarity.results import SimilarityMap, Snapshot


def test_the_null_of_linear_cka_is_golden(pair: tuple[Tensor, Tensor]) -> None:
    assert float(cka_null(CKA(), *map(prepare, pair))) == pytest.approx(0.085829, abs=1e-6)


@pytest.mark.parametrize("measure", [CKA(), CKA(RBFKernel())], ids=lambda m: m.name)
def test_the_null_is_the_mean_over_all_permutations(measure: CKA) -> None:
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    values = [float(measure(x, y[list(order)])) for order in itertools.permutations(range(6))]
    assert float(cka_null(measure, prepare(x), prepare(y))) == pytest.approx(np.mean(values), abs=1e-10)


def test_the_debiased_measure_is_zero_by_chance() -> None:
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    values = [float(CKA(debiased=True)(x, y[list(order)])) for order in itertools.permutations(range(6))]
    assert np.mean(values) == pytest.approx(0, abs=1e-10)
    assert float(cka_null(CKA(debiased=True), prepare(x), prepare(y))) == 0


def test_r_squared_of_independent_features() -> None:
    values = [
        float(CCA("mean_squared")(torch.randn(100, 12, dtype=torch.float64), torch.randn(100, 5, dtype=torch.float64)))
        for _ in range(200)
    ]
    error = np.std(values) / 200**0.5
    assert np.mean(values) == pytest.approx(r_squared_null(12, 5, 100), abs=4 * error)


@pytest.mark.parametrize("measure", [SVCCA(), Procrustes(), CKA()], ids=lambda m: m.name)
def test_permutations(measure: CKA, pair: tuple[Tensor, Tensor]) -> None:
    x, y = map(prepare, pair)
    before = torch.get_rng_state()
    values = permutation_null(measure, x, y, draws=50)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(values, permutation_null(measure, x, y, draws=50))
    assert float(values.max()) < float(measure.between(x, y)) - 0.1
    if measure == CKA():
        assert float(values.mean()) == pytest.approx(float(cka_null(measure, x, y)), abs=0.01)


@pytest.mark.parametrize(
    "measure", [CKA(), CKA(debiased=True), CKA(RBFKernel()), CKA(RBFKernel(), True)], ids=lambda m: m.name
)
def test_leaving_out_each_sample(measure: CKA) -> None:
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    found = cka_without_each(measure, prepare(x), prepare(y))
    kept = [[j for j in range(12) if j != i] for i in range(12)]
    if isinstance(measure.kernel, RBFKernel):  # the kernel's width stays that of all samples
        grams = [measure.kernel(prepare(z)) for z in (x, y)]
        expected = [_by_gram(measure, *(g[rows][:, rows] for g in grams)) for rows in kept]
    else:
        expected = [float(measure(x[rows], y[rows])) for rows in kept]
    assert found.tolist() == pytest.approx(expected, abs=1e-10)


def _by_gram(measure: CKA, k: Tensor, m: Tensor) -> float:
    n = len(k)
    if measure.debiased:
        k, m = k - torch.diag(k.diagonal()), m - torch.diag(m.diagonal())

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        if not measure.debiased:
            h = torch.eye(n, dtype=a.dtype) - 1 / n
            return torch.trace(a @ h @ b @ h)
        return torch.trace(a @ b) + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a @ b).sum()

    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


def test_the_standard_error_is_that_of_new_samples() -> None:
    mix = torch.randn(4, 6, dtype=torch.float64)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(300, 4, dtype=torch.float64)
        return x, x @ mix + torch.randn(300, 6, dtype=torch.float64)

    spread = float(torch.stack([CKA()(*draw()) for _ in range(300)]).std())
    told = np.mean([float(cka_standard_error(CKA(), *map(prepare, draw()))) for _ in range(20)])
    assert told == pytest.approx(spread, rel=0.2)


def test_pwcca_is_golden_and_depends_on_the_basis(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    assert float(PWCCA()(x, y)) == pytest.approx(0.994771, abs=1e-6)
    assert float(PWCCA()(y, x)) == pytest.approx(0.994771, abs=1e-6)
    padded = torch.cat([y, torch.zeros(200, 10, dtype=torch.float64)], dim=1)
    assert float(PWCCA()(x, padded)) == pytest.approx(0.990928, abs=1e-6)
    rotation = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    assert abs(float(PWCCA()(x, y @ rotation)) - 0.994771) > 1e-6
    assert PWCCA()(torch.randn(10, 20), torch.randn(10, 3)).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stream_equals_the_whole(dtype: torch.dtype, pair: tuple[Tensor, Tensor]) -> None:
    x, y = ((z + 100).to(dtype) for z in pair)
    metric = StreamingCKA(30, 20)
    for a, b in zip(x.split(33), y.split(33), strict=True):
        metric.update(a, b)
    assert float(metric.compute()) == pytest.approx(0.657696, abs=1e-6 if dtype is torch.float64 else 1e-5)


def test_ranks_are_summed(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    ranks = [StreamingCKA(30, 20) for _ in range(2)]
    for metric, rows in zip(ranks, (slice(0, 50), slice(50, 200)), strict=True):
        metric.update(x[rows], y[rows])
    whole = StreamingCKA(30, 20)
    for name, reduction in ranks[0]._reductions.items():
        setattr(whole, name, reduction(torch.stack([getattr(metric, name) for metric in ranks])))
    whole._update_count = 1
    assert float(whole.compute()) == pytest.approx(0.657696, abs=1e-6)


def test_streams_name_what_does_not_fit(unchecked: None) -> None:
    metric = StreamingCKA(3, 2)
    with pytest.raises(ValueError, match=r"y: expected shape \(5, 2\), got \(4, 2\)"):
        metric.update(torch.randn(5, 3), torch.randn(4, 2))
    with pytest.raises(ValueError, match="finite"):
        metric.update(torch.full((5, 3), torch.nan), torch.randn(5, 2))
    with pytest.raises(ValueError, match="width_y"):
        StreamingCKA(3, 0)


def test_chance_is_exact_where_it_can_be(pair: tuple[Tensor, Tensor]) -> None:
    x, y = map(prepare, pair)
    assert chance(CKA(), x, y) == pytest.approx(0.085829, abs=1e-6)
    assert chance(CCA("mean_squared"), x, y) == pytest.approx(30 / 199, abs=1e-9)
    assert chance(SVCCA(0.5, "mean_squared"), x, y) == pytest.approx(
        max(SVCCA(0.5).kept(z) for z in (x, y)) / 199, abs=1e-9
    )
    assert chance(Procrustes(), x, y) == pytest.approx(float(permutation_null(Procrustes(), x, y, 60).mean()), abs=0.02)
    assert np.isnan(chance(CKA(), x, prepare(torch.randn(50, 3))))
    assert np.isnan(standard_error(SVCCA(), x, y))
    assert standard_error(CKA(), x, y) == pytest.approx(float(cka_standard_error(CKA(), x, y)))


def test_chance_from_narrow_features_equals_that_from_gram_matrices() -> None:
    x, y = prepare(torch.randn(200, 6, dtype=torch.float64)), prepare(torch.randn(200, 9, dtype=torch.float64))
    assert x.slim is not None
    wide = [from_gram(z.gram, z.width) for z in (x, y)]
    assert chance(CKA(), x, y) == pytest.approx(chance(CKA(), *wide), abs=1e-12)
    for debiased in (False, True):
        measure = CKA(debiased=debiased)
        assert float(measure.between(x, y)) == pytest.approx(float(measure.between(*wide)), abs=1e-12)
        assert float(measure.between(x, y)) == pytest.approx(float(measure.between(x, wide[1])), abs=1e-12)


@pytest.mark.parametrize(("offset", "digits"), [(0, 1e-12), (100, 1e-12), (1e4, 1e-10), (1e8, 1e-6)])
def test_a_debiased_stream_equals_the_whole(offset: float, digits: float, pair: tuple[Tensor, Tensor]) -> None:
    x, y = (z + offset for z in pair)
    metric = StreamingCKA(30, 20, debiased=True)
    for a, b in zip(x.split(7), y.split(7), strict=True):
        metric.update(a, b)
    assert float(metric.compute()) == pytest.approx(float(CKA(debiased=True)(*pair)), abs=digits)
    few = StreamingCKA(2, 2, debiased=True)
    few.update(torch.randn(3, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match="at least 4 samples, got 3"):
        few.compute()


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("constant", [0.0, 0.1, 3.3e6])
def test_a_stream_of_a_constant_side_is_not_a_number(constant: float, debiased: bool) -> None:
    ranks = [StreamingCKA(3, 2, debiased) for _ in range(2)]
    for metric, sizes in zip(ranks, ((7, 11), (5, 64)), strict=True):
        for size in sizes:
            metric.update(torch.randn(size, 3) + 1e4, torch.full((size, 2), constant))
    assert ranks[0].compute().isnan()
    merged = StreamingCKA(3, 2, debiased)
    merged.sums = merged._reductions["sums"](torch.stack([metric.sums for metric in ranks]))
    merged._update_count = 1
    assert merged.compute().isnan()


@pytest.mark.parametrize("debiased", [False, True])
def test_ranks_of_other_offsets_add_up_exactly(debiased: bool, pair: tuple[Tensor, Tensor]) -> None:
    """One rank saw nothing, the others saw samples around other points; forward merges its batches alike."""
    x, y = (z + torch.where(torch.arange(200) < 80, 1e3, -1e3)[:, None] for z in pair)
    ranks = [StreamingCKA(30, 20, debiased) for _ in range(3)]
    ranks[1].update(x[:80], y[:80])
    ranks[2].forward(x[80:90], y[80:90])
    ranks[2].forward(x[90:], y[90:])
    merged = StreamingCKA(30, 20, debiased)
    merged.sums = merged._reductions["sums"](torch.stack([metric.sums for metric in ranks]))
    merged._update_count = 1
    assert float(merged.compute()) == pytest.approx(float(CKA(debiased=debiased)(x, y)), abs=1e-12)


@pytest.mark.parametrize("measure", [Procrustes(), Procrustes(angle=True)], ids=lambda m: m.name)
def test_wide_layers_look_alike_to_procrustes(measure: Procrustes) -> None:
    wide, narrow = prepare(torch.randn(100, 500)), prepare(torch.randn(100, 99))
    assert float(Procrustes().between(wide, prepare(torch.randn(100, 500)))) > 0.9
    said = measure.caution(wide)
    assert said is not None
    assert said == ("width ≥ n, unrelated layers look alike, compare with the values by chance", "d = 500")
    assert measure.caution(narrow) is None


def test_masks_and_class_tokens() -> None:

    mask = torch.tensor([[False, True, True], [True, True, False]])
    found = fit_mask(mask, 5)
    assert found is not None
    assert found.tolist() == [[True, True, False, True, True], [True, True, True, True, False]]
    assert fit_mask(mask, 2) is None
    assert fit_mask(mask, 12) is None


class Signs:
    """A measure of a user's: the share of equal signs in the first feature, without any optional method."""

    name = "signs"
    needs = "features"

    def between(self, x: Representation, y: Representation) -> Tensor:
        assert x.features is not None
        assert y.features is not None
        return (x.features[:, 0].sign() == y.features[:, 0].sign()).double().mean()


class KnownSigns(Signs):
    """The same, with a formula for chance (none for a constant sign) and a binomial standard error."""

    def chance(self, x: Representation, y: Representation) -> float | None:
        assert x.features is not None
        assert y.features is not None
        a, b = (float((z.features[:, 0] > 0).double().mean()) for z in (x, y))
        return a * b + (1 - a) * (1 - b) if 0 < a < 1 else None

    def standard_error(self, x: Representation, y: Representation) -> Tensor:
        p = self.between(x, y)
        return (p * (1 - p) / x.n).sqrt()


def test_a_users_measure_may_say_chance_and_error_itself() -> None:
    layers = {name: prepare(torch.randn(40, 2)) for name in ("first", "last")}
    x, y = layers.values()
    by_formula = chance(KnownSigns(), x, y)
    assert by_formula == pytest.approx(float(permutation_null(Signs(), x, y, 300).mean()), abs=0.02)
    assert chance(Signs(), x, y) == pytest.approx(float(permutation_null(Signs(), x, y, 3).mean()), abs=1e-12)
    assert standard_error(KnownSigns(), x, y) == pytest.approx(0.08, abs=0.02)
    assert np.isnan(standard_error(Signs(), x, y))
    snapshot = Snapshot(0, 0, layers)
    table = SimilarityMap("signs", "", tuple(layers), tuple(layers), torch.zeros(2, 2), "", "", 40)
    known, unknown = (
        with_reliability(table, measure, snapshot, snapshot).chance for measure in (KnownSigns(), Signs())
    )
    assert known is not None
    assert unknown is not None
    assert known.isfinite().all()
    assert unknown.isfinite().tolist() == [[True, False], [False, True]]


def test_permutations_where_a_measures_own_chance_is_none() -> None:
    constant, y = prepare(torch.ones(40, 1) + torch.rand(40, 1)), prepare(torch.randn(40, 1))
    assert KnownSigns().chance(constant, y) is None
    assert chance(KnownSigns(), constant, y) == pytest.approx(float(KnownSigns().between(constant, y)))


class Half:
    """A measure without a base class."""

    name = "Half"

    def between(self, x: Representation, y: Representation) -> Any:
        return np.float32(0.5)


@pytest.mark.parametrize("value", [torch.zeros(2), np.zeros(2), None, "0.5"], ids=type)
@pytest.mark.parametrize(
    ("member", "call"),
    [
        ("between", lambda measure, x, y: matrix(measure, [x], [y])),
        ("chance", chance),
        ("standard_error", standard_error),
    ],
)
def test_what_a_users_measure_gives_must_be_a_number(member: str, call: Callable[..., Any], value: Any) -> None:
    x, y = prepare(torch.randn(9, 2)), prepare(torch.randn(9, 3))
    assert matrix(Half(), [x], [y]).item() == 0.5
    measure = type("Odd", (Half,), {member: lambda *_: value})()
    if member == "chance" and value is None:  # then permutations estimate it
        assert chance(measure, x, y) == 0.5
        return
    with pytest.raises(TypeError, match=rf"^Half\.{member}: expected a number, got (shape \(2,\)|None|'0\.5')$"):
        call(measure, x, y)


def test_what_is_no_measure_is_refused() -> None:
    with pytest.raises(TypeError, match="measure: expected one such as CKA"):
        matrix(CKA, [torch.randn(9, 2)])
    measure = type("Odd", (Half,), {"needs": "matrix"})()
    with pytest.raises(ValueError, match=r"Half\.needs: expected one of gram, scores, features, got 'matrix'"):
        needs([measure])
