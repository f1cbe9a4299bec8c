"""Gradients of lookup tables: as those written out, without a table for each sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_interp.influence import EKFAC, IdentityCurvature, InfluenceFunction
from lightning_interp.influence.curvature.ekfac import Basis, _side_moments, _squares_in_basis, _weighted_squares
from lightning_interp.influence.gradients.factored import FactoredGradients, Lookup, merge_repeated_rows


@pytest.fixture
def sides() -> tuple[FactoredGradients, FactoredGradients]:
    """Rows of a table, and the same with one-hot vectors."""
    torch.manual_seed(0)
    table = merge_repeated_rows(torch.randint(0, 7, (5, 6)), torch.randn(5, 6, 4, dtype=torch.float64), 7)
    assert isinstance(table.inputs, Lookup)
    return table, FactoredGradients(table.inputs.dense().double(), table.outputs)


def test_sums_and_norms(sides: tuple[FactoredGradients, FactoredGradients]) -> None:
    table, dense = sides
    assert torch.allclose(table.sum(), dense.gradients().sum(0))
    assert torch.allclose(table.squared_norms(), dense.gradients().square().sum((1, 2, 3)))
    vectors = torch.randn(3, 1, 4, 7, dtype=torch.float64)
    assert torch.allclose(table.dot(vectors), dense.dot(vectors))


def test_squares_in_a_basis(sides: tuple[FactoredGradients, FactoredGradients]) -> None:
    table, dense = sides
    outputs, inputs = _side_moments(table)
    grads = dense.gradients()
    assert inputs is None
    assert outputs is not None
    assert torch.allclose(outputs, torch.einsum("ngoi,ngpi->gop", grads, grads))
    basis = Basis(torch.linalg.qr(torch.randn(1, 4, 4, dtype=torch.float64))[0], None)
    weights = torch.rand(1, 4, 7, dtype=torch.float64)
    rotated = basis.rotate(grads).square()
    for some in (basis, Basis(None, None)):
        rotated = some.rotate(grads).square()
        assert torch.allclose(_squares_in_basis(table, some), rotated.sum(0))
        assert torch.allclose(_weighted_squares(table, some, weights), (rotated * weights).sum((1, 2, 3)))


@pytest.mark.parametrize("curvature", [EKFAC(None), IdentityCurvature()])
def test_no_table_is_made_for_a_training_sample(curvature: EKFAC, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(12, 3))
    data = TensorDataset(torch.randint(0, 50, (20, 3)), torch.arange(20) % 3)
    made: list[int] = []
    whole = FactoredGradients.gradients

    def gradients(rows: FactoredGradients) -> torch.Tensor:
        if isinstance(rows.inputs, Lookup):
            made.append(len(rows))
        return whole(rows)

    fitted = InfluenceFunction(curvature, damping=0.1).fit(net, data)
    monkeypatch.setattr(FactoredGradients, "gradients", gradients)
    scores = fitted(TensorDataset(*data[:2])).scores
    assert sum(made) <= 2  # those of the queries
    itself = fitted.self_influence().scores
    assert sum(made) <= 2
    assert torch.allclose(itself[:2], scores.diagonal(), rtol=1e-4)
