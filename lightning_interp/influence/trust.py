"""How far to trust influence scores: what is known of them, and a verdict by stated rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from lightning_interp.influence.results import Influence, SpotCheck

Level = Literal["good", "doubtful", "poor"]
LEVELS: tuple[Level, ...] = ("good", "doubtful", "poor")
# Each pair: below the first a finding is poor, from the second on it is good.
COVERAGE_BOUNDS = (0.5, 0.9)  # below the first, most of what the network could change is not in the scores
AGREEMENT_BOUNDS = (0.5, 0.7)  # exact scores of a digits network, confirmed by retraining: 0.80 with 3 × their damping
CORRELATION_BOUNDS = (0.3, 0.7)  # a correlation explains its square of the variance: a tenth, and a half
FEWEST_CHECKS = 5  # with fewer, a correlation is mostly chance
PARAMETERS_LISTED = 12  # that are left out: as many as a reader of the report would go through
ADVICE = {
    "good": "No check speaks against the order of the scores, though only retraining can prove it",
    "doubtful": "Treat the order of the scores as a hint, and inspect the samples themselves",
    "poor": "Do not base decisions on this order",
}


class Finding(NamedTuple):
    """The result of one check."""

    level: Level
    text: str


class Duplicate(NamedTuple):
    """A query that is in the training set as well.

    Args:
        query: its id.
        train_index: dataset index of the same sample.
        score: of that sample on the query; NaN where it was not stored.
        contradicts: whether the two are known to have different labels.
    """

    query: str
    train_index: int
    score: float
    contradicts: bool = False


@dataclass(frozen=True)
class Trust:
    """A verdict on influence scores, and the findings behind it.

    Args:
        level: the worst of the findings.
        findings: the result of each check.
        rows: (name, text): everything that is known of the scores.
    """

    level: Level
    findings: tuple[Finding, ...]
    rows: tuple[tuple[str, str], ...]

    @property
    def sentence(self) -> str:
        """What the verdict means, and the findings behind it."""
        reasons = "; ".join(finding.text for finding in self.findings if finding.level == self.level)
        return f"{ADVICE[self.level]} ({reasons})"


def meaning(unit: str) -> str:
    """Return what a score of this unit means."""
    if unit == "none":
        return (
            "A positive score means that the training sample lowers the query's loss (it is helpful), a negative one"
            " that it raises the loss (it is harmful). The scores have no unit: only their order within a query is"
            " meaningful, not their size."
        )
    return (
        "A score is the predicted increase of the query's loss if the training sample were left out, in units of the"
        f" {unit}. Samples with positive scores are helpful, those with negative ones harmful. The prediction comes"
        " from gradients and curvature at the trained parameters, not from retraining. Rely on the order of the scores:"
        " away from an optimum their sizes can be many times too large."
    )


def trust(influence: Influence, duplicates: Sequence[Duplicate] = (), spot_checks: Sequence[SpotCheck] = ()) -> Trust:
    """Judge scores by what is known of them.

    Poor: less than half of the parameters are covered, less than half of the strongest samples stay under another
    setting, or five or more spot checks of the whole network correlate below 0.3. Doubtful: below 0.9, 0.7 and 0.7, a
    number that is not known, scores without a unit, nothing but the parameters to judge by, or a caution on record
    (another loss than the trained one, augmentation). Good is the absence of these: that an order is stable does
    not make it right (a gradient dot product does not depend on damping at all). Retraining of the last layer alone can
    confirm scores, but not refute them: most of their effect may be in the layers in front.

    Args:
        influence: the scores.
        duplicates: queries that are training samples.
        spot_checks: scores that retraining has checked.
    """
    findings = [
        _judge(influence.coverage, COVERAGE_BOUNDS, f"the scores cover {influence.coverage:.1%} of the parameters")
    ]
    findings += [
        _judge(share, AGREEMENT_BOUNDS, _agreement(name, share)) for name, share in influence.agreement.items()
    ]
    findings += _judge_spot_checks(spot_checks)
    if influence.unit == "none":
        findings.append(
            Finding("doubtful", "scores without a unit predict no change of the loss that retraining could confirm")
        )
    elif len(findings) == 1:
        findings.append(Finding("doubtful", "neither another setting nor retraining was used to check the scores"))
    findings += [Finding("doubtful", caution) for caution in influence.doubts]
    level = max((finding.level for finding in findings), key=LEVELS.index)
    return Trust(level, tuple(findings), (*_trust_rows(influence, duplicates), *_last_layer_rows(spot_checks)))


def _judge_spot_checks(checks: Sequence[SpotCheck]) -> list[Finding]:
    """Return the finding from retraining, where there are enough checks."""
    if len(checks) < FEWEST_CHECKS:
        return []
    r, of_network = correlation(checks), all(check.whole for check in checks)
    if not of_network and not r >= CORRELATION_BOUNDS[1]:  # the last layer alone cannot refute; NaN does not confirm
        return []
    restriction = "" if of_network else " of the last layer alone"
    return [_judge(r, CORRELATION_BOUNDS, f"{_correlation_text(r, checks)} by retraining{restriction}")]


def _last_layer_rows(checks: Sequence[SpotCheck]) -> list[tuple[str, str]]:
    if all(check.whole for check in checks) or len(checks) < FEWEST_CHECKS:
        return []
    missing = "the scores include what the layers in front would learn differently, the checks do not"
    return [("last layer retrained alone", f"{_correlation_text(correlation(checks), checks)}; {missing}")]


def _correlation_text(r: float, checks: Sequence[SpotCheck]) -> str:
    return f"predicted and actual changes of the loss have a correlation of {r:.2f} in {len(checks)} checks"


def correlation(checks: Sequence[SpotCheck]) -> float:
    """Return Pearson's correlation of predicted and actual; NaN where either does not vary."""
    predicted, actual = ([getattr(check, side) for check in checks] for side in ("predicted", "actual"))
    if len(set(predicted)) < 2 or len(set(actual)) < 2:
        return math.nan
    return float(np.corrcoef(predicted, actual)[0, 1])


def _judge(value: float, bounds: tuple[float, float], text: str) -> Finding:
    poor_below, good_from = bounds
    return Finding("poor" if value < poor_below else "good" if value >= good_from else "doubtful", text)


def _agreement(setting: str, share: float) -> str:
    percentage = "an unknown share" if math.isnan(share) else f"{share:.0%}"
    return f"{percentage} of each query's strongest samples stay among the strongest with {setting}"


def _trust_rows(influence: Influence, duplicates: Sequence[Duplicate]) -> tuple[tuple[str, str], ...]:
    origin = [note for note in influence.notes if note.startswith("damping: ")]
    choice = [note for note in influence.notes if " was chosen: " in note]
    notes = [note for note in influence.notes if note not in (*origin, *choice)]
    damping = "none" if math.isnan(influence.damping) else f"{influence.damping:.3g}"
    curvature_n = influence.curvature_n
    return (
        ("method", "; ".join((influence.method, *choice))),
        ("unit of the scores", _unit(influence.unit)),
        ("training samples scored", f"{influence.n_scored:,}"),
        ("curvature estimated from", f"{curvature_n:,} training samples" if curvature_n else "none"),
        ("damping λ", "; ".join((damping, *(note.removeprefix("damping: ") for note in origin)))),
        ("parameters covered", f"{influence.coverage:.1%} ({influence.covered_elements:,} numbers)"),
        *([("left out", _left_out(influence))] if influence.left_out else []),
        ("norm of the mean training gradient", _gradient_norm(influence.gradient_norm)),
        *(("agreement", _agreement(name, share)) for name, share in influence.agreement.items()),
        *(("duplicate", _duplicate(duplicate)) for duplicate in duplicates),
        *(("note", note) for note in (*notes, *influence.doubts)),
    )


def _unit(unit: str) -> str:
    return "none: only their order is meaningful" if unit == "none" else unit


def _gradient_norm(norm: float) -> str:
    if math.isnan(norm):
        return "not computed: these scores do not assume an optimum"
    return f"{norm:.3g} (0 at an optimum, which influence functions assume)"


def _duplicate(duplicate: Duplicate) -> str:
    label = " except for its label" if duplicate.contradicts else ""
    score = "was not stored" if math.isnan(duplicate.score) else f"is {duplicate.score:+.2e}"
    train_sample = f"training sample #{duplicate.train_index}"
    return f"query #{duplicate.query} is identical to {train_sample}{label}, whose score for it {score}"


def _left_out(influence: Influence) -> str:
    """Return each parameter that is left out, with its share of all elements, the largest first."""
    total = influence.covered_elements + sum(influence.left_out.values())
    ranked = sorted(influence.left_out.items(), key=lambda item: -item[1])
    listed = [f"{name} {count / total:.1%}" for name, count in ranked[:PARAMETERS_LISTED]]
    unlisted = ranked[PARAMETERS_LISTED:]
    if unlisted:
        listed.append(f"{len(unlisted)} others {sum(count for _, count in unlisted) / total:.1%}")
    return ", ".join(listed)
