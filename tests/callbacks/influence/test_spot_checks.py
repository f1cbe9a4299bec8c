"""Scores checked by retraining."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset, TensorDataset

from lightning_interp import DataInfluence, Task
from lightning_interp.callbacks.influence import callback as callback_of
from lightning_interp.callbacks.influence.scoring import InfluenceQuestion
from lightning_interp.callbacks.influence.spot_checks import RetrainMethod, checked_by_retraining
from lightning_interp.data.samples import Samples
from lightning_interp.influence import GaussNewton, InfluenceFunction, LastLayer, Trajectory, leave_one_out
from lightning_interp.influence.gradients.distributed import SingleProcess
from lightning_interp.influence.results import SpotCheck
from lightning_interp.progress import quiet
from tests.models import Net, loaders, trainer

DAMPING = 1.0


@pytest.fixture
def asked() -> InfluenceQuestion:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(40, 4), torch.arange(40) % 3)
    train, query = Subset(data, range(39, 9, -1)), Subset(data, range(2))
    return InfluenceQuestion(nn.Linear(4, 3), Samples(train), Samples(query), Task(), quiet, SingleProcess())


def by(asked: InfluenceQuestion, retrain: RetrainMethod, top_k: int | None = None) -> tuple[SpotCheck, ...]:
    fitted = InfluenceFunction(GaussNewton(), DAMPING).fit(asked.model, asked.train, asked.task)
    return checked_by_retraining(asked, fitted(asked.query, top_k=top_k), retrain, DAMPING, math.inf)


def test_the_users_function_gets_dataset_indices(asked: InfluenceQuestion) -> None:
    given: list[list[int]] = []

    def retrain(indices: Sequence[int]) -> nn.Module:
        given.append(list(indices))
        torch.manual_seed(sum(indices))
        return nn.Linear(4, 3)

    checks = by(asked, retrain)
    assert given[0] == list(range(39, 9, -1))
    whole = InfluenceFunction(GaussNewton(), DAMPING)(asked.model, asked.train, asked.query)
    for check in checks:
        place = 39 - check.train_index
        scores = whole.scores[check.query]
        assert check.predicted == pytest.approx(float(scores[place] - scores.mean()), rel=1e-5)
        assert place in (int(scores.argmax()), int(scores.argmin()))
        without = [index for index in given[0] if index != check.train_index]
        assert without in given
        x, y = asked.train.dataset.dataset[check.query]
        after, before = (float(F.cross_entropy(retrain(some)(x), y).detach()) for some in (without, given[0]))
        assert check.actual == pytest.approx(after - before, abs=1e-6)
        assert check.whole


@pytest.mark.parametrize("top_k", [None, 2])
def test_the_last_layer_is_damped_as_training_was(asked: InfluenceQuestion, top_k: int | None) -> None:
    last = LastLayer.of(asked.model, asked.train, asked.query, damping=DAMPING)
    checks = by(asked, "last_layer", top_k)
    assert len(checks) == 4
    moved = leave_one_out(last.retrain, last.losses, 30, [39 - check.train_index for check in checks])
    for place, check in enumerate(checks):
        assert check.actual == pytest.approx(float(moved[check.query, place]))
        assert check.actual == pytest.approx(check.predicted, rel=0.3)
        assert not check.whole


@pytest.mark.parametrize(("estimator", "kind"), [(None, Trajectory), (InfluenceFunction(damping=0.3), float)])
def test_the_callback_hands_its_damping_on(
    estimator: InfluenceFunction | None, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def noted(
        asked: InfluenceQuestion, found: Any, retrain: RetrainMethod, damping: Any, seconds: float
    ) -> tuple[SpotCheck, ...]:
        given.append((damping, seconds))
        return checked_by_retraining(asked, found, retrain, damping, seconds)

    monkeypatch.setattr(callback_of, "checked_by_retraining", noted)
    options = {"queries": 1, "estimator": estimator, "on_error": "raise", "budget_seconds": 40}
    for retrain in ("last_layer", lambda _: Net()):
        callback = DataInfluence(retrain=retrain, **options)  # type: ignore[arg-type]
        trainer(tmp_path, max_epochs=1, callbacks=[callback]).fit(Net(), *loaders())
    assert all(isinstance(damping, kind) for damping, _ in given)
    assert [seconds for _, seconds in given] == [40, math.inf]


def test_what_does_not_fit_is_left_out_and_said(asked: InfluenceQuestion) -> None:
    scores = InfluenceFunction(GaussNewton(), DAMPING)(asked.model, asked.train, asked.query)
    whole = checked_by_retraining(asked, scores, "last_layer", DAMPING, math.inf)
    first = [check for check in whole if check.train_index == whole[0].train_index]
    with pytest.warns(UserWarning, match="1 of 3 retrainings fit into 0 s"):
        found = checked_by_retraining(asked, scores, "last_layer", DAMPING, 0.0)
    assert list(found) == first
