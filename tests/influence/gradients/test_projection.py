"""Random projections of factored gradients, and the Gauss–Newton matrix between them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_interp.influence import Damping, GaussNewton, InfluenceFunction, ProjectedGaussNewton
from lightning_interp.influence.curvature.projected import second_moment
from lightning_interp.influence.gradients.factored import FactoredGradients, Lookup
from lightning_interp.influence.gradients.projection import Projection

DATA = Path(__file__).parents[2] / "data"


def drawn(n: int, groups: int, positions: int, i: int, o: int) -> FactoredGradients:
    inputs = torch.randn(n, groups, positions, i, dtype=torch.float64)
    return FactoredGradients(inputs, torch.randn(n, groups, positions, o, dtype=torch.float64))


def dense(rows: FactoredGradients) -> FactoredGradients:
    """Return rows of the same shape whose gradients are made, one position for each of their columns."""
    grads = rows.gradients()
    n, groups, o, i = grads.shape
    eye = torch.eye(i, dtype=grads.dtype).expand(n, groups, i, i)
    return FactoredGradients(eye, grads.transpose(2, 3).reshape(n, groups, i, o))


def naive(rows: FactoredGradients, projection: Projection, block: str) -> Tensor:
    """Project each entry by itself, with the signs and bins that unit gradients show."""
    groups, o, i = rows.shape
    units = torch.eye(groups * o * i, dtype=torch.float64).reshape(-1, groups, o, i)
    matrix = projection(
        {block: FactoredGradients(torch.eye(i).double().expand(len(units), groups, i, i), units.transpose(2, 3))}
    )
    assert bool(((matrix.abs().round(decimals=9) == 1).sum(1) == 1).all())
    return rows.gradients().flatten(1) @ matrix


@pytest.mark.parametrize(
    "rows",
    [drawn(3, 1, 1, 40, 30), drawn(3, 4, 1, 20, 15), drawn(3, 1, 2, 7, 5), drawn(3, 4, 6, 5, 3), drawn(3, 1, 1, 1, 50)],
    ids=["convolved", "convolved in groups", "made", "grouped", "vector"],
)
def test_every_entry_goes_to_one_bin_whatever_the_order(rows: FactoredGradients) -> None:
    for dim in (8, 64):
        projection = Projection(dim, seed=3)
        found = projection({"block": rows})
        assert torch.allclose(found, naive(rows, projection, "block"), atol=1e-9)
        assert torch.allclose(found, projection({"block": dense(rows)}), atol=1e-9)


def test_tables_are_projected_by_the_rows_taken() -> None:
    lookup = FactoredGradients(Lookup(torch.tensor([[2, 5], [0, 3]]), 9), torch.randn(2, 1, 2, 4, dtype=torch.float64))
    projection = Projection(16)
    assert torch.allclose(projection({"table": lookup}), projection({"table": dense(lookup)}), atol=1e-12)


def errors(rows: dict[str, FactoredGradients], dim: int, seeds: int = 200) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over seeds of the projected dot products' errors, relative to the norms."""
    flat = torch.cat([row.gradients().flatten(1) for row in rows.values()], dim=1)
    seen = torch.stack([Projection(dim, seed)(rows) for seed in range(seeds)])
    error = (seen @ seen.mT - flat @ flat.T) / torch.outer(flat.norm(dim=1), flat.norm(dim=1))
    return error.mean(0), error.std(0)


@pytest.fixture(scope="module")
def layers() -> dict[str, FactoredGradients]:
    torch.manual_seed(0)
    return {"a": drawn(4, 1, 1, 30, 40), "b": drawn(4, 1, 3, 12, 6), "c": drawn(4, 1, 1, 1, 20)}


def test_dot_products_are_kept_in_the_mean(layers: dict[str, FactoredGradients]) -> None:
    mean, deviation = errors(layers, 32)
    assert float(mean.abs().max()) < 4 * float(deviation.max()) / 200**0.5


def test_the_error_falls_with_the_root_of_dim(layers: dict[str, FactoredGradients]) -> None:
    small, large = (errors(layers, dim)[1].mean() for dim in (16, 256))
    assert float(small / large) == pytest.approx(4, rel=0.15)
    assert float(large) < 1.5 / 256**0.5


def test_halves_are_projections_whose_mean_is_the_whole(layers: dict[str, FactoredGradients]) -> None:
    whole = Projection(64, seed=1)
    seen, first, second = whole(layers), *(half(layers) for half in whole.halves)
    assert first.shape == second.shape == (4, 32)
    assert torch.allclose((first @ first.T + second @ second.T) / 2, seen @ seen.T)
    gram = torch.cat([row.gradients().flatten(1) for row in layers.values()], dim=1)
    scale = (gram @ gram.T).diagonal()
    found = []
    for seed in range(200):
        halves = [half(layers) for half in Projection(32, seed).halves]
        found.append(torch.stack([(h @ h.T - gram @ gram.T) / (scale[:, None] * scale).sqrt() for h in halves]))
    error = torch.stack(found).flatten(2)
    assert float(error.mean(0).abs().max()) < 4 * float(error.std(0).max()) / 200**0.5
    pairs = [float(torch.corrcoef(error[:, :, pair].T)[0, 1]) for pair in range(error.shape[2])]
    assert abs(np.mean(pairs)) < 0.1


def test_other_processes_and_machines_see_the_same_projection() -> None:
    rows = {"fc": FactoredGradients(torch.ones(1, 1, 1, 5), torch.arange(1.0, 5.0)[None, None, None])}
    assert [round(value) for value in Projection(8, 5)(rows)[0].tolist()] == [-8, 2, 2, 6, -8, 0, 10, 6]


def test_seeds_and_blocks_differ() -> None:
    row = drawn(2, 1, 1, 30, 40)
    assert not torch.allclose(Projection(32, 0)({"a": row}), Projection(32, 1)({"a": row}))
    assert not torch.allclose(Projection(32, 0)({"a": row}), Projection(32, 0)({"b": row}))


def test_bad_dims_are_named(unchecked: None) -> None:
    for dim in (0, 3, 2.0):
        with pytest.raises(ValueError, match="even number"):
            ProjectedGaussNewton(dim)
    with pytest.raises(ValueError, match="whole number from 1"):
        ProjectedGaussNewton(columns=0)


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    train = TensorDataset(torch.randn(14, 32, dtype=torch.float64), torch.arange(14) % 3)
    return net, train, TensorDataset(torch.randn(2, 32, dtype=torch.float64), torch.tensor([0, 2]))


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("columns", [None, 1000])
def test_scores_equal_the_formula_in_the_projected_space(
    small: tuple[nn.Module, TensorDataset, TensorDataset], columns: int | None, spread: bool
) -> None:
    net, train, query = small
    values = {name: torch.rand_like(p) + 0.01 if spread else 0.05 for name, p in net.named_parameters()}
    damping = Damping(values, "test")
    fitted = InfluenceFunction(ProjectedGaussNewton(16, columns), damping).fit(net, train)
    whole = InfluenceFunction(GaussNewton(), damping).fit(net, train)
    shift = damping.shift(fitted.coverage)
    blocks = list(fitted.coverage.blocks)
    added = torch.cat([torch.as_tensor(shift[b]).double().expand(fitted.coverage.shapes[b]).flatten() for b in blocks])
    unit = torch.eye(len(added), dtype=torch.float64)
    matrix = _projected(fitted.inverse.projection, fitted.coverage.shapes, unit, spread)
    half = added.rsqrt().diag()
    grads = {name: _gradients(net, data) for name, data in (("train", train), ("query", query))}
    hessian = whole.fitted.matrix
    projected = matrix.T @ half @ hessian @ half @ matrix + torch.eye(16)
    seen = {name: g @ half @ matrix for name, g in grads.items()}
    expected = seen["query"] @ torch.linalg.solve(projected, seen["train"].T) / len(train)
    found = fitted(query)
    assert torch.allclose(found.scores, expected, rtol=1e-7, atol=1e-10)
    assert torch.allclose(fitted.self_influence().scores, fitted(train).scores.diagonal())


def _projected(projection: Projection, shapes: dict[str, tuple[int, int, int]], units: Tensor, whole: bool) -> Tensor:
    """Return the projection as a matrix `(parameters, k)`; of whitened rows each block is one vector."""
    parts, start = [], 0
    for block, (groups, o, i) in shapes.items():
        size = groups * o * i
        own = units[start : start + size, start : start + size]
        rows = (
            FactoredGradients(own.new_ones(size, 1, 1, 1), own[:, None, None])
            if whole
            else _matrices(own, groups, o, i)
        )
        parts.append(projection({block: rows}))
        start += size
    return torch.cat(parts)


def _matrices(flat: Tensor, groups: int, o: int, i: int) -> FactoredGradients:
    grads = flat.reshape(-1, groups, o, i)
    return FactoredGradients(torch.eye(i).double().expand(len(flat), groups, i, i), grads.transpose(2, 3))


def _gradients(net: nn.Module, data: TensorDataset) -> Tensor:
    """Return gradients in the blocks' order: weight and bias of a layer side by side."""
    rows = []
    for x, y in data:
        grads = torch.autograd.grad(nn.functional.cross_entropy(net(x[None]), y[None]), list(net.parameters()))
        pairs = zip(grads[::2], grads[1::2], strict=True)
        rows.append(torch.cat([torch.cat([w.flatten(1), b[:, None]], dim=1).flatten() for w, b in pairs]))
    return torch.stack(rows)


def test_both_halves_are_compared_with_the_whole(small: tuple[nn.Module, TensorDataset, TensorDataset]) -> None:
    net, train, query = small
    found = InfluenceFunction(ProjectedGaussNewton(64), 0.05).fit(net, train)(query, check=True)
    names = {"one half of the projection", "the other half of the projection"}
    assert names <= set(found.agreement)
    assert all(0 < found.agreement[name] <= 1 for name in names)


def test_large_sums_are_the_sum_of_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[second_moment.__module__], "PILED_ROWS", 10)
    parts = [torch.randn(7, 4, dtype=torch.float64) for _ in range(5)]
    rows = torch.cat(parts)
    assert torch.allclose(second_moment(parts), rows.T @ rows)
    with pytest.raises(ValueError, match="expected samples"):
        second_moment([])


def test_projected_scores_rank_subsets_of_a_real_network() -> None:
    held = np.load(DATA / "digits_mlp_subsets.npz")
    images = np.load(DATA / "digits_logistic_regression.npz")
    train, query = (
        TensorDataset(torch.tensor(images[f"{part}_x"]).float(), torch.tensor(images[f"{part}_y"]))
        for part in ("train", "test")
    )
    net = nn.Sequential()
    for name, layer in (("fc1", nn.Linear(64, 64)), ("act", nn.ReLU()), ("fc2", nn.Linear(64, 10))):
        net.add_module(name, layer)
    net.load_state_dict({name: torch.tensor(held[name]) for name in net.state_dict()})
    found = InfluenceFunction(ProjectedGaussNewton(512), damping=0.00969)(net, train, query)
    masks = np.unpackbits(held["masks"], axis=1)[:, : len(train)]
    predicted = masks @ found.scores.double().numpy().T
    lds = np.mean([spearmanr(predicted[:, q], -held["loss"][:, q])[0] for q in range(len(query))])
    assert lds > 0.73
