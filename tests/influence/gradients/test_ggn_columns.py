"""Columns of the Gauss–Newton matrix: exact roots, and unbiased samples of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_interp import Task
from lightning_interp.influence.gradients.ggn_columns import (
    CurvatureColumns,
    PrioritySample,
    Root,
    has_random_root,
    hessian_root,
)


def outer_products(root: Root) -> Tensor:
    n, k = root.norms.shape
    columns = torch.stack([root.column(torch.arange(n), torch.full((n,), j)).reshape(n, -1) for j in range(k)], dim=1)
    assert torch.allclose(columns.square().sum(2), root.norms)
    return columns.mT @ columns


@pytest.mark.parametrize("kind", ["classes", "positions", "binary", "squeezed", "multilabel", "regression", "own"])
def test_hessian_root_is_the_hessian_of_the_loss(kind: str) -> None:
    outputs = torch.randn(4, 1 if kind == "binary" else 3, dtype=torch.float64)
    outputs = outputs[:, 0] if kind == "squeezed" else outputs
    outputs = torch.randn(4, 3, 2, 2, dtype=torch.float64) if kind == "positions" else outputs
    targets = {
        "classes": torch.tensor([0, 1, 2, 1]),
        "positions": torch.randint(0, 3, (4, 2, 2)),
        "own": torch.tensor([0, 1, 2, 1]),
        "binary": torch.tensor([0, 1, 1, 0]),
        "squeezed": torch.tensor([0, 1, 1, 0]),
        "multilabel": torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 0, 0]]),
        "regression": torch.randn(4, 3, dtype=torch.float64),
    }[kind]
    own = Task(loss=lambda o, t: 3 * torch.nn.functional.cross_entropy(o, t, reduction="none"))
    task = own if kind == "own" else Task()
    found = outer_products(hessian_root(outputs, targets, task))
    for sample in range(4):
        one = slice(sample, sample + 1)
        expected = torch.autograd.functional.hessian(
            lambda o, one=one: task.per_sample(o[None], targets[one]).sum(), outputs[sample]
        )
        assert torch.allclose(found[sample], expected.reshape(found[sample].shape), atol=1e-10)


def test_certain_and_impossible_classes_give_no_nan() -> None:
    logits = torch.tensor([[200.0, 0.0, -300.0], [0.0, 0.0, 0.0], [1e4, -1e4, 1e4]])
    found = outer_products(hessian_root(logits, torch.tensor([0, 1, 2]), Task()))
    chance = logits.softmax(1)
    assert torch.allclose(found, torch.diag_embed(chance) - chance[:, :, None] * chance[:, None], atol=1e-6)


def test_classes_at_many_positions_are_mixed_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_interp.influence.gradients.ggn_columns.MOST_ENUMERATED", 5)
    logits = torch.randn(1, 3, 2, dtype=torch.float64).expand(20_000, -1, -1)
    assert has_random_root(logits, torch.zeros(20_000, 2).long(), Task())
    found = outer_products(
        hessian_root(logits, torch.zeros(20_000, 2).long(), Task(), torch.Generator().manual_seed(0))
    )
    chance = logits[0].softmax(0)
    expected = torch.zeros(3, 2, 3, 2, dtype=torch.float64)
    for position in range(2):
        p = chance[:, position]
        expected[:, position, :, position] = (torch.diag(p) - torch.outer(p, p)) / 2
    assert float((found.mean(0) - expected.reshape(6, 6)).norm() / expected.norm()) < 0.02


def roots(logits: Tensor, step: int) -> list[Root]:
    targets = torch.zeros(len(logits)).long()
    return [
        hessian_root(logits[start : start + step], targets[start : start + step], Task(kind="classes"))
        for start in range(0, len(logits), step)
    ]


def sampled(held: list[Root], count: int, draws: torch.Generator, ranks: int = 1) -> CurvatureColumns:
    samples = [PrioritySample(count, draws) for _ in range(ranks)]
    start = 0
    for place, root in enumerate(held):
        samples[place % ranks].add(root, torch.arange(start, start + len(root.norms)))
        start += len(root.norms)
    return samples[0].columns([sample.sampled_columns() for sample in samples])


def total(vectors: Tensor) -> Tensor:
    return vectors.T @ vectors


def test_a_sample_of_everything_is_everything() -> None:
    logits = 2 * torch.randn(30, 4, dtype=torch.float64)
    found = sampled(roots(logits, 7), 1000, torch.Generator())
    chance = logits.softmax(1)
    assert torch.allclose(total(found.vectors), torch.diag(chance.sum(0)) - chance.T @ chance)
    assert (found.total, len(found.sample_indices), found.n) == (90, 90, 30)
    assert found.trace_share == pytest.approx(1)
    assert found.notes == ()
    assert found.sample_indices.tolist() == sorted(found.sample_indices.tolist())


def test_a_sample_is_right_in_the_mean_whatever_the_batches_and_ranks() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(40, 4, dtype=torch.float64)
    chance = logits.softmax(1)
    expected = torch.diag(chance.sum(0)) - chance.T @ chance
    draws = torch.Generator().manual_seed(1)
    for step, ranks in ((7, 1), (40, 1), (10, 3)):
        held = roots(logits, step)
        sums = [total(sampled(held, 20, draws, ranks).vectors) for _ in range(1000)]
        drawn = torch.stack(sums)
        error, spread = drawn.mean(0) - expected, drawn.std(0)
        assert float(error.norm()) < 2.5 * float(spread.norm()) / len(sums) ** 0.5
        assert float(spread.norm() / expected.norm()) > 0.05


def test_large_columns_are_kept_surely_and_memory_stays_small() -> None:
    logits = torch.full((500, 2), 0.0, dtype=torch.float64)
    logits[:, 0] = 12
    logits[123] = 0
    found = sampled(roots(logits, 10), 5, torch.Generator().manual_seed(0))
    assert 123 in found.sample_indices.tolist()
    assert len(found.sample_indices) == 5
    assert found.notes[0].startswith("the curvature is an unbiased sample: 5 of its 500 columns")


def test_too_many_outputs_of_an_own_loss_are_named() -> None:
    outputs = torch.randn(2, 600)
    task = Task(loss=lambda o, t: o.square().mean(1))
    with pytest.raises(ValueError, match="at most 512 numbers per sample with a loss of your own, got 600"):
        hessian_root(outputs, torch.zeros(2), task)


def test_no_samples_are_named() -> None:
    with pytest.raises(ValueError, match="expected samples"):
        sampled([], 5, torch.Generator())
