"""How far influence scores are trusted, by stated rules."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lightning_interp.influence.results import Influence, SpotCheck
from lightning_interp.influence.trust import Duplicate, correlation, meaning, trust

FOUND = Influence(
    scores=torch.tensor([[0.5, -0.25]]),
    train_ids=torch.tensor([4, 9]),
    train_targets=torch.tensor([0, 1]),
    query_targets=torch.tensor([0]),
    query_losses=torch.tensor([0.7]),
    method="influence function, EKFAC()",
    damping=0.01,
    covered=("head.weight",),
    left_out={},
    covered_elements=90,
    gradient_norm=0.02,
    curvature_n=200,
    notes=("damping: SGD, 2/τ", "EKFAC was chosen: it is small", "beware"),
    agreement={"3 × the damping": 0.87},
    scored=1000,
)
LINE = [SpotCheck(0, i, 0.1 * i, 0.2 * i) for i in range(6)]


def changed(**fields: object) -> Influence:
    return dataclasses.replace(FOUND, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "level", "reason"),
    [
        (FOUND, "good", "87% of each query's strongest samples stay"),
        (
            changed(agreement={"a": 0.87, "b": 0.69}),
            "doubtful",
            "69% of each query's strongest samples stay",
        ),
        (changed(agreement={"a": 0.49}), "poor", "49% of each query's strongest samples"),
        (changed(agreement={"a": math.nan}), "doubtful", "an unknown share of each query's strongest samples"),
        (changed(agreement={}), "doubtful", "neither another setting nor retraining"),
        (changed(left_out={"norm.weight": 11}), "doubtful", "89.1% of the parameters"),
        (changed(left_out={"norm.weight": 91}), "poor", "49.7% of the parameters"),
        (changed(unit="none"), "doubtful", "without a unit"),
        (changed(doubts=("it is another loss",)), "doubtful", "it is another loss"),
    ],
)
def test_the_verdict_follows_the_rules(found: Influence, level: str, reason: str) -> None:
    told = trust(found)
    assert told.level == level
    assert reason in told.sentence
    assert all(finding.text in told.sentence for finding in told.findings if finding.level == level)
    assert not any(finding.text in told.sentence for finding in told.findings if finding.level != level)


@pytest.mark.parametrize(
    ("actual", "level"),
    [
        ([0, 1, 2, 3, 4.0], "good"),
        ([0, 3, 1, 2, 3.0], "doubtful"),
        ([4, 3, 2, 1, 0.0], "poor"),
        ([1.0] * 5, "doubtful"),
    ],
)
def test_spot_checks_are_judged_by_their_correlation(actual: list[float], level: str) -> None:
    checks = [SpotCheck(0, place, float(place), value) for place, value in enumerate(actual)]
    assert trust(FOUND, spot_checks=checks).level == level
    assert trust(FOUND, spot_checks=checks[:4]).level == "good", "four are too few to be judged"


def test_the_last_layer_can_confirm_but_not_refute() -> None:
    good = [check._replace(whole=False) for check in LINE]
    told = trust(changed(), (), good)
    assert [found.level for found in told.findings if "by retraining of the last layer alone" in found.text] == ["good"]
    other = [check._replace(actual=-check.actual) for check in good]
    told = trust(changed(), (), other)
    assert not [found for found in told.findings if "retraining" in found.text]
    said = dict(told.rows)["last layer retrained alone"]
    assert said.startswith(
        "predicted and actual changes of the loss have a correlation of -1.00 in 6 checks; the scores"
    )
    for checks in (LINE, other[:4]):
        assert "last layer retrained alone" not in dict(trust(changed(), (), checks).rows)
    assert trust(changed(), (), [check._replace(whole=True) for check in other]).level == "poor"


def test_correlation() -> None:
    assert correlation(LINE) == pytest.approx(1)
    assert math.isnan(correlation(LINE[:1]))
    assert math.isnan(correlation([]))


def test_all_numbers_are_in_the_rows() -> None:
    found = changed(left_out={f"part{i}": 20 - i for i in range(14)})
    rows = trust(found, [Duplicate("12", 40, 0.5), Duplicate("13", 41, math.nan)]).rows
    said = dict(rows)
    assert said["method"] == "influence function, EKFAC(); EKFAC was chosen: it is small"
    assert said["damping λ"] == "0.01; SGD, 2/τ"
    assert said["training samples scored"] == "1,000"
    assert said["curvature estimated from"] == "200 training samples"
    assert said["parameters covered"] == "32.3% (90 numbers)"
    assert said["left out"].startswith("part0 7.2%, part1 6.8%")
    assert said["left out"].endswith("part11 3.2%, 2 others 5.4%")
    assert said["norm of the mean training gradient"].startswith("0.02 (0 at an optimum")
    assert [text for name, text in rows if name == "note"] == ["beware"]
    duplicates = [text for name, text in rows if name == "duplicate"]
    assert duplicates == [
        "query #12 is identical to training sample #40, whose score for it is +5.00e-01",
        "query #13 is identical to training sample #41, whose score for it was not stored",
    ]
    unknown = dict(trust(changed(gradient_norm=math.nan)).rows)["norm of the mean training gradient"]
    assert unknown == "not computed: these scores do not assume an optimum"
    assert dict(trust(changed(damping=math.nan, notes=(), curvature_n=0)).rows)["damping λ"] == "none"


def test_scores_without_a_unit_are_not_called_losses() -> None:
    assert "units of the loss" in meaning("loss")
    assert "units of" not in meaning("none")
    assert "only their order" in meaning("none")
    assert "only their order" in dict(trust(changed(unit="none")).rows)["unit of the scores"]
