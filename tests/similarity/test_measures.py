"""Golden numbers, slow transcriptions of the papers, and the invariances that each measure claims or does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.cross_decomposition import CCA as SklearnCCA  # noqa: N811
from torch import Tensor

from lightning_interp.similarity import CCA, CKA, SVCCA, Measure, Procrustes, RBFKernel, from_gram, matrix, prepare

MEASURES = [
    CKA(),
    CKA(debiased=True),
    CKA(RBFKernel()),
    SVCCA(),
    SVCCA(summary="mean_squared"),
    Procrustes(),
]
INVARIANT_TO_LINEAR_MAPS = [CCA(), CCA("mean_squared"), CCA("largest")]
GOLDEN = {
    "CKA": 0.657696,
    "CKA_debiased": 0.632393,
    "CKA_RBF_0.5": 0.761219,
    "CCA_mean": 0.990431,
    "CCA_mean_squared": 0.981117,
    "CCA_largest": 0.999288,
    "SVCCA_0.99": 0.994080,
    "SVCCA_0.99_mean_squared": 0.988230,
    "Procrustes_similarity": 0.762808,
    "Procrustes_angle": 0.703151,
}


def naive_cka(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float(torch.linalg.norm(y.T @ x) ** 2 / (torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y)))


def naive_hsic1(x: Tensor, y: Tensor) -> float:
    """Song et al. 2012, equation 5, on the uncentred features."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    one = torch.ones(n, dtype=x.dtype)
    total = (
        torch.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    )
    return float(total / (n * (n - 3)))


def naive_svcca(x: Tensor, y: Tensor, variance: float = 0.99) -> float:
    def reduced(z: Tensor) -> Tensor:
        z = z - z.mean(0)
        u, s, _ = torch.linalg.svd(z, full_matrices=False)
        share, k = 0.0, 0
        while share < variance * float((s**2).sum()):
            share, k = share + float(s[k] ** 2), k + 1
        return u[:, :k] * s[:k]

    a, b = reduced(x), reduced(y)
    angles = subspace_angles(a.numpy(), b.numpy())
    return float(np.cos(angles)[: min(a.shape[1], b.shape[1])].mean())


@pytest.mark.parametrize(
    "measure", [*MEASURES, *INVARIANT_TO_LINEAR_MAPS, Procrustes(angle=True)], ids=lambda m: m.name
)
def test_golden_numbers(measure: Measure, pair: tuple[Tensor, Tensor]) -> None:
    assert float(measure(*pair)) == pytest.approx(GOLDEN[measure.name], abs=1e-6)


def test_svcca_keeps_what_the_paper_says(pair: tuple[Tensor, Tensor]) -> None:
    assert [SVCCA().kept(prepare(z)) for z in pair] == [30, 18]


@pytest.mark.parametrize("widths", [(5, 9), (40, 300), (300, 300), (7, 200)])
def test_transcriptions(widths: tuple[int, int]) -> None:
    x = torch.randn(100, widths[0], dtype=torch.float64)
    y = torch.randn(100, widths[1], dtype=torch.float64) + x[:, :1]
    unbiased = naive_hsic1(x, y) / (naive_hsic1(x, x) * naive_hsic1(y, y)) ** 0.5
    assert float(CKA()(x, y)) == pytest.approx(naive_cka(x, y), abs=1e-10)
    assert float(CKA(debiased=True)(x, y)) == pytest.approx(unbiased, abs=1e-10)
    assert float(SVCCA(0.7)(x, y)) == pytest.approx(naive_svcca(x, y, 0.7), abs=1e-8)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_same_up_to_rotation_scale_and_shift(measure: Measure, pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    rotation = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))[0]
    assert float(measure(x, 3 * x @ rotation + 5)) == pytest.approx(1, abs=1e-9)
    assert float(measure(3 * x @ rotation + 5, y)) == pytest.approx(float(measure(x, y)), abs=1e-9)
    assert float(measure(y, x)) == pytest.approx(float(measure(x, y)), abs=1e-12)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_not_invariant_to_a_general_linear_map(measure: Measure, pair: tuple[Tensor, Tensor]) -> None:
    shrink = torch.logspace(0, -2, 30, dtype=torch.float64)
    assert float(measure(pair[0] * shrink, pair[0] * shrink.flip(0))) < 0.8


@pytest.mark.parametrize("measure", INVARIANT_TO_LINEAR_MAPS, ids=lambda m: m.name)
def test_cca_is_invariant_to_a_general_linear_map(measure: CCA, pair: tuple[Tensor, Tensor]) -> None:
    shrink = torch.logspace(0, -2, 30, dtype=torch.float64)
    mixed = (pair[0] * shrink) @ torch.randn(30, 30, dtype=torch.float64)
    assert float(measure(pair[0], mixed)) == pytest.approx(1, abs=1e-9)
    assert float(measure(mixed, pair[1])) == pytest.approx(GOLDEN[measure.name], abs=1e-6)


def test_cca_agrees_with_scikit_learn(pair: tuple[Tensor, Tensor]) -> None:
    x, y = (z.numpy()[:, :4] for z in pair)
    a, b = SklearnCCA(n_components=4, max_iter=10_000, tol=1e-12).fit_transform(x, y)
    theirs = np.mean([np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(4)])
    assert float(CCA()(torch.tensor(x), torch.tensor(y))) == pytest.approx(theirs, abs=1e-6)


def naive_rbf_cka(x: Tensor, y: Tensor, fraction: float) -> float:
    def gram(z: Tensor) -> Tensor:
        distances = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
        above = distances[tuple(torch.triu_indices(len(z), len(z), 1))].sort().values
        width = fraction * (above[(len(above) - 1) // 2] + above[len(above) // 2]) / 2
        return torch.exp(-(distances**2) / (2 * width**2))

    h = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    k, m = h @ gram(x) @ h, h @ gram(y) @ h
    return float((k * m).sum() / (k.norm() * m.norm()))


@pytest.mark.parametrize("fraction", [0.2, 0.5, 3.0])
def test_rbf_transcription(fraction: float, pair: tuple[Tensor, Tensor]) -> None:
    found = CKA(RBFKernel(fraction))(*pair)
    assert float(found) == pytest.approx(naive_rbf_cka(*pair, fraction), abs=1e-9)


def test_a_wide_rbf_kernel_is_the_linear_one(pair: tuple[Tensor, Tensor]) -> None:
    for debiased in (False, True):
        wide = CKA(RBFKernel(100.0), debiased)(*pair)
        assert float(wide) == pytest.approx(float(CKA(debiased=debiased)(*pair)), abs=1e-3)


def test_procrustes_transcription(pair: tuple[Tensor, Tensor]) -> None:
    x, y = (torch.nn.functional.pad(z - z.mean(0), (0, 30 - z.shape[1])) for z in pair)
    u, _, vt = torch.linalg.svd(x.T @ y)
    x, y = x / x.norm(), y / y.norm()
    residual = (x @ (u @ vt) - y).norm() ** 2
    assert float(Procrustes()(*pair)) == pytest.approx(float(1 - residual / 2), abs=1e-10)
    assert float(Procrustes(angle=True)(x, 5 * x)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_float32_far_from_the_origin(measure: Measure, pair: tuple[Tensor, Tensor]) -> None:
    x, y = ((z.float() + 100 * z.std()) for z in pair)
    assert float(measure(x, y)) == pytest.approx(GOLDEN[measure.name], abs=1e-5)


def test_independent_wide_features() -> None:
    x, y = torch.randn(512, 2048), torch.randn(512, 2048)
    assert float(CKA()(x, y)) == pytest.approx(0.80, abs=0.01)
    assert abs(float(CKA(debiased=True)(x, y))) < 0.02
    assert SVCCA(0.5).caution(prepare(x)) is not None
    assert CKA().caution(prepare(x)) is not None
    assert CKA(debiased=True).caution(prepare(x)) is None


def test_debiased_is_not_clamped() -> None:
    values = [float(CKA(debiased=True)(torch.randn(8, 3), torch.randn(8, 3))) for _ in range(20)]
    assert min(values) < 0


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_a_constant_layer_is_nan(measure: Measure, pair: tuple[Tensor, Tensor]) -> None:
    assert measure(torch.ones(200, 4), pair[1].float()).isnan()


def test_svcca_refuses_as_many_directions_as_samples() -> None:
    assert SVCCA(1.0)(torch.randn(20, 50), torch.randn(20, 3)).isnan()


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_half_precision_features(measure: Measure, pair: tuple[Tensor, Tensor]) -> None:
    half = measure(pair[0].bfloat16(), pair[1].bfloat16())
    assert float(half) == pytest.approx(GOLDEN[measure.name], abs=0.01)


def test_gram_and_features_agree(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    centred = x - x.mean(0)
    gram = from_gram(centred @ centred.T, 30)
    for measure in MEASURES:
        assert float(measure.between(gram, prepare(y))) == pytest.approx(GOLDEN[measure.name], abs=1e-6)


def test_matrix_prepares_once_and_compares_all(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    table = matrix(CKA(), [x, y, prepare(x)])
    assert table.shape == (3, 3)
    assert torch.allclose(table, table.T)
    assert table[0, 1] == pytest.approx(GOLDEN["CKA"], abs=1e-6)
    assert matrix(CKA(), [x], [y, x]).tolist()[0] == pytest.approx([GOLDEN["CKA"], 1.0], abs=1e-6)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (torch.zeros(4), "expected \\(n, d\\)"),
        (torch.zeros(1, 3), "expected \\(n, d\\)"),
        (torch.zeros(4, 3, dtype=torch.long), "floating point"),
        (torch.full((4, 3), torch.nan), "finite"),
    ],
)
def test_bad_features_are_named(bad: Tensor, says: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=says):
        prepare(bad)


def test_other_errors_are_named(unchecked: None) -> None:
    with pytest.raises(ValueError, match="expected 5 samples"):
        CKA()(torch.randn(5, 2), torch.randn(6, 2))
    with pytest.raises(ValueError, match="at least 4 samples"):
        CKA(debiased=True)(torch.randn(3, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match="share in"):
        SVCCA(1.5)
    with pytest.raises(ValueError, match="expected one of mean, mean_squared, largest"):
        CCA("median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive number"):
        RBFKernel(0.0)
