"""Mutual nearest neighbours: the paper's loops, invariances, ties, chance, the standard error, and a run with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_interp import RepresentationSimilarity, compare
from lightning_interp.similarity import (
    Measure,
    MutualKNN,
    chance,
    from_gram,
    matrix,
    permutation_null,
    prepare,
    standard_error,
)
from lightning_interp.similarity.representation import Representation
from lightning_interp.similarity.results import Snapshot
from lightning_interp.storage.folder import Folder
from lightning_interp.storage.snapshots import new_store
from tests.models import Net, loaders, trainer


def naive_neighbours(x: Tensor, k: int) -> list[set[int]]:
    """All samples no further away than the k-th nearest, by loops."""
    sets = []
    for i in range(len(x)):
        distances = {j: float((x[i] - x[j]).square().sum()) for j in range(len(x)) if j != i}
        kth = sorted(distances.values())[k - 1]
        sets.append({j for j, distance in distances.items() if distance <= kth * (1 + 1e-9) + 1e-12})
    return sets


def naive_overlap(x: Tensor, y: Tensor, k: int) -> float:
    pairs = zip(naive_neighbours(x, k), naive_neighbours(y, k), strict=True)
    return sum(len(a & b) / max(len(a), len(b)) for a, b in pairs) / len(x)


def correlated(n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    x, noise = (torch.randn(n, d, dtype=torch.float64, generator=generator) for d in (6, 4))
    return x, x[:, :4] + 0.5 * noise


def grid(n: int) -> Tensor:
    """Features of few values: many samples are duplicates of each other, and many distances equal."""
    return torch.randint(0, 3, (n, 2)).double()


@pytest.mark.parametrize("k", [1, 5, 38])
def test_it_is_what_the_loops_give(k: int) -> None:
    x, y = correlated(40)
    expected = naive_overlap(x, y, k)
    assert float(MutualKNN(k)(x, y)) == pytest.approx(expected, abs=1e-12)
    assert float(MutualKNN(k)(x.float(), y.float())) == pytest.approx(expected, abs=0.01)
    assert all(len(a) == k for a in naive_neighbours(x, k))


def test_wide_layers_and_every_form_give_the_same() -> None:
    x = torch.randn(60, 400)
    y = x[:, :100] + 0.3 * torch.randn(60, 100)
    expected = naive_overlap(x.double(), y.double(), 5)
    a, b = prepare(x), prepare(y)
    assert float(MutualKNN(5).between(a, b)) == pytest.approx(expected, abs=1e-9)
    assert float(MutualKNN(5).between(a.reduced("scores"), b.reduced("scores"))) == pytest.approx(expected, abs=1e-9)
    assert float(MutualKNN(5).between(from_gram(a.gram, 400), b)) == pytest.approx(expected, abs=1e-9)


def test_same_up_to_rotation_scale_and_shift() -> None:
    x, y = correlated(80)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert float(MutualKNN()(x, 3 * x @ rotation + 5)) == 1
    assert float(MutualKNN()(3 * x @ rotation + 5, y)) == pytest.approx(float(MutualKNN()(x, y)), abs=1e-12)
    assert float(MutualKNN()(y, x)) == pytest.approx(float(MutualKNN()(x, y)), abs=1e-12)
    assert MutualKNN.symmetric


def test_not_the_same_under_a_general_linear_map() -> None:
    x, _ = correlated(80)
    scales = torch.logspace(0, -2, 6, dtype=torch.float64)
    assert float(MutualKNN()(x * scales, x * scales.flip(0))) < 0.5


def test_it_sees_only_who_is_near() -> None:
    """Far groups may change places: their members' neighbours stay."""
    groups = torch.randn(3, 20, 4, dtype=torch.float64)
    centres = torch.tensor([0.0, 100.0, 300.0], dtype=torch.float64)[:, None, None]
    first, then = (groups + centres).flatten(0, 1), (groups + centres.flip(0) ** 2).flatten(0, 1)
    assert float(MutualKNN(10)(first, then)) == 1


@pytest.mark.parametrize("k", [1, 4, 10])
def test_ties_depend_on_no_order(k: int) -> None:
    x, y, order = grid(50), torch.randn(50, 3, dtype=torch.float64), torch.randperm(50)
    measure = MutualKNN(k)
    assert float(measure(x, y)) == pytest.approx(naive_overlap(x, y, k), abs=1e-12)
    assert float(measure(x[order], y[order])) == pytest.approx(float(measure(x, y)), abs=1e-12)
    assert float(measure(x, x)) == 1
    rotated = x @ torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64))[0] / 3 + 1
    assert float(measure(x, rotated)) == 1
    assert float(measure(x.float(), rotated.float())) == 1
    assert measure.caution(prepare(x)) is not None
    assert measure.caution(prepare(y)) is None


def test_duplicates_are_compared_as_groups() -> None:
    """Two layers that fold the same samples together agree, although no order among duplicates is defined."""
    which = torch.arange(60) % 6
    x, y = (torch.randn(6, d, dtype=torch.float64)[which] for d in (3, 5))
    assert float(MutualKNN(9)(x, y)) == 1
    assert MutualKNN(9).caution(prepare(x)) is None
    assert float(MutualKNN(4)(x, y)) == 1
    said = MutualKNN(4).caution(prepare(x))
    assert said is not None
    assert said == ("many samples equally far away, more neighbours than k", "9 neighbours")


@pytest.mark.parametrize("features", [torch.full((20, 3), 3.3), torch.eye(20)], ids=["constant", "one-hot"])
@pytest.mark.parametrize("k", [1, 10, 19])
def test_equal_distances_are_nan(features: Tensor, k: int) -> None:
    assert MutualKNN(k)(features, torch.randn(20, 4)).isnan()
    layers = prepare(features), prepare(torch.randn(20, 4))
    assert np.isnan(chance(MutualKNN(k), *layers))
    assert np.isnan(standard_error(MutualKNN(k), *layers))


@pytest.mark.parametrize("tied", [False, True])
def test_chance_is_the_mean_over_permutations(tied: bool) -> None:
    x, y = map(prepare, (grid(60), grid(60)) if tied else correlated(60))
    exact = chance(MutualKNN(7), x, y)
    values = permutation_null(MutualKNN(7), x, y, draws=400)
    assert exact == pytest.approx(float(values.mean()), abs=4 * float(values.std()) / 400**0.5)
    if not tied:
        assert exact == pytest.approx(7 / 59, abs=1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("k", [1, 6])
def test_the_standard_error_is_the_jackknife(k: int, tied: bool) -> None:
    x, y = (grid(25), correlated(25)[1]) if tied else correlated(25)
    rest = [torch.arange(25) != i for i in range(25)]
    left = np.array([naive_overlap(x[rows], y[rows], k) for rows in rest])
    expected = float((24 / 25 * ((left - left.mean()) ** 2).sum()) ** 0.5)
    assert standard_error(MutualKNN(k), prepare(x), prepare(y)) == pytest.approx(expected, abs=1e-12)


def test_the_standard_error_covers_that_of_new_samples() -> None:
    """It is on the safe side, by at most a factor of two; the overlaps' own is too small."""
    draws = [tuple(map(prepare, correlated(100))) for _ in range(200)]
    measure = MutualKNN(10)
    spread = float(torch.stack([measure.between(*draw) for draw in draws]).std())
    told = np.mean([standard_error(measure, *draw) for draw in draws[:50]])
    assert spread < told < 2 * spread


def test_what_cannot_be_known_is_nan() -> None:
    few = [prepare(torch.randn(7, 2)) for _ in range(2)]
    assert np.isnan(standard_error(MutualKNN(2), *few))
    layers = [prepare(torch.randn(20, 2)) for _ in range(2)]
    assert np.isnan(standard_error(MutualKNN(19), *layers))
    assert not np.isnan(standard_error(MutualKNN(18), *layers))
    assert np.isnan(chance(MutualKNN(2), layers[0], few[0]))


def test_errors_name_the_argument(unchecked: None) -> None:
    for k in (0, -1, 2.5, True, "many"):
        with pytest.raises(ValueError, match=r"MutualKNN\(k=...\): expected a whole number from 1"):
            MutualKNN(k)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"MutualKNN\(k=...\): expected a whole number from 1 to n − 1 = 9, got 10"):
        MutualKNN()(torch.randn(10, 2), torch.randn(10, 2))
    with pytest.raises(ValueError, match="expected 12 samples as x has, got 13"):
        MutualKNN(2).between(prepare(torch.randn(12, 2)), prepare(torch.randn(13, 2)))
    half = Representation(torch.eye(12, dtype=torch.float16), "gram", 50)
    with pytest.raises(ValueError, match="in full precision"):
        MutualKNN(2).between(half, half)


def test_it_is_a_measure_like_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(MutualKNN(), Measure)
    assert MutualKNN(5).name == "MutualKNN_5"
    assert MutualKNN(3) == MutualKNN(3)
    layers = [prepare(torch.randn(30, 3)) for _ in range(3)]
    searched: list[Representation] = []
    nearest = MutualKNN._nearest
    monkeypatch.setattr(MutualKNN, "_nearest", lambda self, x: (searched.append(x), nearest(self, x))[1])
    table = matrix(MutualKNN(), layers)
    assert torch.equal(table.diagonal(), torch.ones(3, dtype=torch.float64))
    assert torch.equal(table, table.T)
    assert len(searched) == 3


def test_a_run_and_its_comparison_show_chance_and_error(tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        callback = RepresentationSimilarity(["conv2", "head"], [MutualKNN(3)], on_error="raise")
        fit = trainer(tmp_path, max_epochs=2, callbacks=[callback])
        fit.fit(Net(), *loaders())
        fit.logger.finalize("success")
        runs.append(fit.log_dir)
    report = (Path(runs[0]) / "interp" / "report.html").read_text()
    assert "MutualKNN_3" in report
    row = report[report.index("<td>conv2</td>") :].split("</tr>")[0].replace("</td>", "").split("<td>")[1:]
    value, by_chance, error = (float(cell.strip()) for cell in row[1:4])
    assert 0 < value <= 1
    assert by_chance == pytest.approx(3 / 11, abs=0.05)
    assert error >= 0
    (table,) = compare(*runs, measures=[MutualKNN(3)]).maps["MutualKNN_3"]
    assert table.chance is not None
    assert table.standard_error is not None
    assert table.chance.shape == (2, 2)
    assert table.chance.isfinite().all()
    assert table.standard_error.isfinite().all()


def test_a_table_has_chance_for_layers_of_any_name(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        store = new_store(
            Folder(str(tmp_path / name / "interp" / "similarity")),
            {"n": 30, "source": "validation set", "fingerprint": "p", "ids": list(range(30))},
        )
        layers = {layer: prepare(torch.randn(30, d)) for layer, d in (("first", 5), ("last", 3))}
        store.append(Snapshot(0, 0, layers))
        paths.append(tmp_path / name)
    (table,) = compare(*paths, measures=[MutualKNN(4)]).maps["MutualKNN_4"]
    assert table.chance is not None
    assert torch.allclose(table.chance, torch.full((2, 2), 4 / 29, dtype=torch.float64))
    assert "By chance layers of one name score 0.14" in table.note
