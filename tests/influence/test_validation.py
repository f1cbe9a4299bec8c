"""Predictions beside retraining: the arithmetic against slow transcriptions, and on retrainings of real digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from lightning_interp.influence import (
    LinearDatamodelingScore,
    Retrained,
    group_scores,
    leave_k_out,
    leave_one_out,
    linear_datamodeling_score,
)
from tests.ranks import run_on_two_ranks

DATA = Path(__file__).parents[1] / "data"
NAN = float("nan")


@pytest.fixture(scope="module")
def subsets() -> tuple[Tensor, Tensor]:
    """Return masks `(100, 1437)` and losses `(100, 100)` of a network trained on half of the digits, 100 times."""
    held = np.load(DATA / "digits_mlp_subsets.npz")
    masks = np.unpackbits(held["masks"], axis=1)[:, :1437].astype(bool)
    return torch.tensor(masks), torch.tensor(held["loss"])


def mean_model(x: Tensor, decay: float, reweighted: bool) -> tuple[Tensor, Tensor]:
    """Return exact scores and loss changes for J = Σ w (θ − x)²/2 + λθ²/2, queries asking for (θ − q)²/2."""
    n, queries = len(x), torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    theta = x.mean() / (1 + decay)
    scores = (theta - queries)[:, None] * (theta - x) / (n * (1 + decay))

    def retrain(kept: list[int]) -> Tensor:
        weight = 1 / len(kept) if reweighted else 1 / n
        return weight * x[kept].sum() / (weight * len(kept) + decay)

    return scores, leave_one_out(retrain, lambda at: (at - queries).square() / 2, n, range(n))


@pytest.mark.parametrize("reweighted", [False, True])
def test_scores_predict_retraining_by_their_own_convention(reweighted: bool) -> None:
    x = torch.randn(400, dtype=torch.float64) + 1
    scores, actual = mean_model(x, 0.5, reweighted)
    groups = [[i] for i in range(400)]
    right = Retrained(group_scores(scores, groups, reweighted), actual)
    other = Retrained(group_scores(scores, groups, not reweighted), actual)
    assert right.relative_error < 0.01
    assert other.relative_error > 0.1
    assert right.slope == pytest.approx(1, abs=0.01)


def test_groups_without_and_with_reweighting() -> None:
    scores = torch.randn(2, 10, dtype=torch.float64)
    groups = [[3], [0, 7, 9]]
    plain, mean = group_scores(scores, groups), group_scores(scores, groups, reweighted=True)
    for q in range(2):
        for j, group in enumerate(groups):
            assert float(plain[q, j]) == pytest.approx(sum(float(scores[q, i]) for i in group))
            centred = sum(float(scores[q, i] - scores[q].mean()) for i in group)
            assert float(mean[q, j]) == pytest.approx(centred * 10 / (10 - len(group)))


def test_retraining_sees_all_but_the_group() -> None:
    seen: list[list[int]] = []

    def retrain(kept: list[int]) -> int:
        seen.append(kept)
        return sum(kept)

    found = leave_k_out(retrain, lambda model: torch.tensor([1.0, 2.0]) * model, 5, [[4], [0, 3]])
    assert seen == [[0, 1, 2, 3, 4], [0, 1, 2, 3], [1, 2, 4]]
    assert found.dtype is torch.float64
    assert found.tolist() == [[-4, -3], [-8, -6]]
    assert leave_one_out(retrain, lambda model: torch.tensor([1.0]) * model, 5, [2, 1]).tolist() == [[-2, -1]]


def test_the_four_numbers() -> None:
    predicted = torch.randn(3, 40, dtype=torch.float64).round(decimals=1)
    actual = 1.5 * predicted + 0.3 * torch.randn(3, 40, dtype=torch.float64) + 0.1
    found, (a, b) = Retrained(predicted, actual), (predicted.numpy().ravel(), actual.numpy().ravel())
    assert found.pearson == pytest.approx(pearsonr(a, b)[0])
    assert found.spearman == pytest.approx(spearmanr(a, b)[0])
    assert found.slope == pytest.approx(np.polyfit(a, b, 1)[0])
    assert found.relative_error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_a_constant_side_has_no_correlation() -> None:
    found = Retrained(torch.full((1, 4), 0.1), torch.arange(4.0)[None])
    assert np.isnan(found.pearson)
    assert np.isnan(found.spearman)
    assert np.isnan(found.slope)


def test_lds_of_real_subsets_equals_scipy(subsets: tuple[Tensor, Tensor]) -> None:
    masks, losses = subsets
    scores = torch.linalg.lstsq(masks.double(), -losses.double()).solution.T
    scores = scores + 0.02 * scores.std() * torch.randn(scores.shape) + torch.randn(scores.shape) * 2e-4
    found = linear_datamodeling_score(scores, masks, losses)
    for q in range(0, 100, 9):
        sums = [sum(scores[q, masks[j]].tolist()) for j in range(100)]
        assert float(found[q]) == pytest.approx(spearmanr(sums, -losses[:, q].numpy())[0], abs=1e-9)
    assert 0.1 < float(found.mean()) < 0.99
    assert torch.allclose(linear_datamodeling_score(-scores, masks, losses), -found)


def test_lds_gives_ties_their_mean_rank(subsets: tuple[Tensor, Tensor]) -> None:
    masks, losses = torch.eye(5).bool(), torch.tensor([[3.0], [1.0], [1.0], [2.0], [2.0]])
    scores = torch.tensor([[1.0, 1.0, 4.0, 2.0, 3.0]])
    expected = spearmanr(scores[0].numpy(), -losses[:, 0].numpy())[0]
    assert float(linear_datamodeling_score(scores, masks, losses)) == pytest.approx(expected)


def test_a_query_without_variation_has_no_lds() -> None:
    masks, losses = torch.eye(4).bool(), torch.tensor([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [1.0, 0.4]])
    found = linear_datamodeling_score(torch.tensor([[1.0, 2, 3, 4], [4.0, 3, 2, 1]]), masks, losses)
    assert found.isnan().tolist() == [True, False]
    assert float(found[1]) == pytest.approx(1)
    metric = LinearDatamodelingScore()
    metric.update(torch.ones(4, 1), losses[:, 1:])
    assert bool(metric.compute().isnan())


def measured(rows: slice) -> Tensor:
    """Return what the metric says of some rows, given in two parts, the second empty if there is one row."""
    torch.manual_seed(0)
    predicted = torch.randn(9, 4)
    losses = (0.5 * torch.randn(9, 4) - predicted).round(decimals=1)
    metric = LinearDatamodelingScore()
    for part in (slice(0, 2), slice(2, None)):
        metric.update(predicted[rows][part], losses[rows][part])
    return metric.compute()


def rank(number: int, folder: str) -> None:
    """Be one of two processes, with a part of the subsets."""
    torch.save(measured((slice(0, 6), slice(6, 9))[number]), f"{folder}/{number}.pt")


def test_two_ranks_say_what_one_says(tmp_path: Path) -> None:
    run_on_two_ranks(rank, tmp_path)
    whole = measured(slice(0, 9))
    for number in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{number}.pt"), whole)
    assert float(whole) < 1


def test_the_metric_equals_the_function(subsets: tuple[Tensor, Tensor]) -> None:
    masks, losses = subsets
    scores = torch.randn(100, 1437)
    metric = LinearDatamodelingScore()
    for part in range(0, 100, 30):
        rows = slice(part, part + 30)
        metric.update(masks[rows].float() @ scores.T, losses[rows])
    expected = linear_datamodeling_score(scores, masks, losses).mean()
    assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-4)
    metric.reset()
    with pytest.raises(ValueError, match="at least 3 subsets, got none"), pytest.warns(UserWarning, match="before"):
        metric.compute()


@pytest.mark.usefixtures("unchecked")
def test_errors_of_the_score_are_named() -> None:
    scores, masks, losses = torch.randn(2, 6), torch.rand(5, 6) > 0.5, torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"bool \(m, 6\) and \(m, 2\)"):
        linear_datamodeling_score(scores, masks, losses.T)
    with pytest.raises(ValueError, match=r"got torch.float32 \(5, 6\)"):
        linear_datamodeling_score(scores, masks.float(), losses)
    with pytest.raises(ValueError, match="at least 3 subsets, got 2"):
        linear_datamodeling_score(scores, masks[:2], losses[:2])
    with pytest.raises(FloatingPointError, match="scores: expected finite"):
        linear_datamodeling_score(torch.full((2, 6), NAN), masks, losses)
    with pytest.raises(FloatingPointError, match="losses: expected finite"):
        linear_datamodeling_score(scores, masks, torch.full((5, 2), NAN))
    metric = LinearDatamodelingScore()
    metric.update(torch.randn(1, 2), torch.randn(1, 2))
    with pytest.raises(ValueError, match="at least 3 subsets, got 1"):
        metric.compute()
    with pytest.raises(ValueError, match=r"same shape \(m, 2\), got \(4, 3\) and \(4, 3\)"):
        metric.update(torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"same shape \(m, 2\), got \(4, 2\) and \(3, 2\)"):
        metric.update(torch.randn(4, 2), torch.randn(3, 2))
    with pytest.raises(FloatingPointError, match="predicted"):
        metric.update(torch.full((1, 2), NAN), torch.randn(1, 2))


@pytest.mark.usefixtures("unchecked")
def test_errors_of_retraining_are_named() -> None:
    for groups, said in (([], "got none"), ([[0, 5]], "0, 5"), ([[]], r"\[\]"), ([[1, 1]], "1, 1"), ([[-1]], "-1")):
        with pytest.raises(ValueError, match=said):
            leave_k_out(len, lambda model: torch.ones(2), 5, groups)
        with pytest.raises(ValueError, match=said):
            group_scores(torch.ones(2, 5), groups)
    with pytest.raises(ValueError, match="1 to 1 distinct"):
        leave_k_out(len, lambda model: torch.ones(2), 2, [[0, 1]])
    with pytest.raises(FloatingPointError, match="losses after retraining"):
        leave_one_out(len, lambda model: torch.tensor([NAN]), 5, [0])
    with pytest.raises(ValueError, match="one loss per query"):
        leave_one_out(len, lambda model: torch.tensor(1.0), 5, [0])
    with pytest.raises(ValueError, match=r"got \(1, 4\) and \(1, 3\)"):
        Retrained(torch.ones(1, 4), torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 3 pairs"):
        Retrained(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(FloatingPointError, match="actual"):
        Retrained(torch.ones(1, 4), torch.full((1, 4), NAN))
