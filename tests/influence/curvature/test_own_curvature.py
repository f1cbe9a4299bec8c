"""A curvature of a class of the user's own: what its members return is checked, and the error names them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_interp.callbacks.influence.budget import afford_curvature
from lightning_interp.data.samples import Samples
from lightning_interp.influence import EKFAC, GaussNewton, InfluenceFunction
from lightning_interp.influence.estimators.prepared import PreparedInfluence

TRAIN = TensorDataset(torch.randn(60, 4), torch.arange(60) % 3)
QUERY = TensorDataset(torch.randn(2, 4), torch.arange(2))


class Own:
    """No base class, no dataclass, no optional member."""

    def check(self, parameters: int) -> None:
        pass

    def fit(self, *arguments: Any) -> Any:
        return GaussNewton().fit(*arguments)


class Zeros:
    """A fitted curvature and its inverse in one, whose scores are of one sample too many."""

    n, notes, mean_eigenvalue = 1, (), 1.0

    def inverse(self, _: Any) -> Zeros:
        return self

    def against(self, _: Any) -> Any:
        return lambda rows: torch.zeros(2, len(rows["weight"]) + 1)

    def squares(self, rows: Any) -> Tensor:
        return torch.zeros(len(rows["weight"]) + 1)


def own(**members: Any) -> Any:
    return type("Own", (Own,), members)()


def test_check_and_fit_are_enough() -> None:
    model = nn.Linear(4, 3)
    scores = InfluenceFunction(Own())(model, TRAIN, QUERY).scores
    assert torch.equal(scores, InfluenceFunction(GaussNewton())(model, TRAIN, QUERY).scores)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"default_damping": lambda *_: 0.1}, r"^Own\.default_damping: expected a Damping, got 0\.1$"),
        (
            {"fit": lambda *_: None},
            r"^Own\.fit: expected n, mean_eigenvalue, .* got NoneType without n, .*$",
        ),
    ],
)
def test_what_it_returns_is_checked(members: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        InfluenceFunction(own(**members)).fit(nn.Linear(4, 3), TRAIN)


def test_its_scores_have_a_row_per_query_and_a_column_per_sample() -> None:
    fitted = InfluenceFunction(own(fit=lambda *_: Zeros())).fit(nn.Linear(4, 3), TRAIN)
    with pytest.raises(ValueError, match=r"^Own: expected .* scores of shape \(2, 60\), got \(2, 61\)$"):
        fitted(QUERY)
    with pytest.raises(ValueError, match=r"^Own: expected .* scores of shape \(60,\), got \(61,\)$"):
        fitted.self_influence()


def test_a_class_is_no_curvature() -> None:
    with pytest.raises(TypeError, match=r"^InfluenceFunction\(curvature=\.\.\.\): expected an object with check"):
        InfluenceFunction(EKFAC)  # type: ignore[arg-type]


def test_a_short_budget_leaves_a_curvature_that_cannot_be_copied_as_it_is() -> None:
    curvature, model = own(samples=50), nn.Linear(4, 3)

    def prepare(estimator: InfluenceFunction) -> PreparedInfluence:
        return estimator.prepare(model, Samples.of(TRAIN))

    prepared, message = afford_curvature(InfluenceFunction(curvature), prepare, 1e-7)
    assert prepared.curvature is curvature
    assert not message
