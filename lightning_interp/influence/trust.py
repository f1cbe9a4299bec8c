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
COVERED = (0.5, 0.9)
AGREED = (0.5, 0.7)  # a digits network's exact scores, which retraining confirms, agree by 0.80 with 3 × their damping
CORRELATED = (0.3, 0.7)
FEWEST_CHECKS = 5
MOST_NAMED = 12
ADVICE = {
    "good": "Nothing found here speaks against the order of the scores, though only retraining proves it",
    "doubtful": "Take the order of the scores as a hint, and look at the samples",
    "poor": "Do not act on this order",
}


class Finding(NamedTuple):
    """One thing that was checked."""

    level: Level
    said: str


class Duplicate(NamedTuple):
    """A query that is in the training set as well.

    Args:
        query: its id.
        train_index: dataset index of the same sample.
        score: of that sample on the query; NaN where it was not kept.
        contradicts: whether the two are known to have different labels.
    """

    query: str
    train_index: int
    score: float
    contradicts: bool = False


@dataclass(frozen=True)
class Trust:
    """What a reader is told of the scores' worth.

    Args:
        level: the worst of the findings.
        findings: each check that was judged.
        rows: (name, text): all numbers.
    """

    level: Level
    findings: tuple[Finding, ...]
    rows: tuple[tuple[str, str], ...]

    @property
    def sentence(self) -> str:
        """What the verdict means, and the findings behind it."""
        reasons = "; ".join(found.said for found in self.findings if found.level == self.level)
        return f"{ADVICE[self.level]} ({reasons})"


def meaning(unit: str) -> str:
    """Return what a score of this unit says."""
    if unit == "none":
        return (
            "A positive score says that the training sample lowers the query's loss, so it is helpful; a negative one"
            " is harmful. Scores have no unit: only their order within a query means something, not their size."
        )
    return (
        "A score is the predicted rise of the query's loss if the training sample were left out, in units of the"
        f" {unit}. Positive is helpful, negative harmful. It is predicted from gradients and curvature at the trained"
        " parameters, not by retraining: read the order; away from an optimum the sizes can come out many times too"
        " large."
    )


def trust(found: Influence, duplicates: Sequence[Duplicate] = (), spot_checks: Sequence[SpotCheck] = ()) -> Trust:
    """Judge scores by what is known of them.

    Poor: less than half of the parameters are covered, less than half of the strongest samples stay under another
    setting, or five or more spot checks of the whole network correlate below 0.3. Doubtful: below 0.9, 0.7 and 0.7, a
    number that is not known, scores without a unit, nothing but the parameters to judge by, or what the record itself
    doubts (another loss than the trained one, augmentation). Good is the absence of these: that an order is steady does
    not make it right (a gradient dot product does not depend on damping at all). Retraining of the last layer alone can
    confirm scores, but not refute them: most of what they say may be in the layers in front.

    Args:
        found: the scores.
        duplicates: queries that are training samples.
        spot_checks: scores that retraining has checked.
    """
    findings = [_judged(found.coverage, COVERED, f"{found.coverage:.1%} of the parameters are covered")]
    findings += [_judged(share, AGREED, _agreed(name, share)) for name, share in found.agreement.items()]
    findings += _confirmed(spot_checks)
    if found.unit == "none":
        findings.append(Finding("doubtful", "scores without a unit predict no change of loss that could be checked"))
    elif len(findings) == 1:
        findings.append(Finding("doubtful", "neither another setting nor retraining has checked them"))
    findings += [Finding("doubtful", doubt) for doubt in found.doubts]
    level = max((finding.level for finding in findings), key=LEVELS.index)
    return Trust(level, tuple(findings), (*_rows(found, duplicates), *_by_last_layer(spot_checks)))


def _confirmed(checks: Sequence[SpotCheck]) -> list[Finding]:
    """Return what retraining says of the scores, where there are checks enough."""
    if len(checks) < FEWEST_CHECKS:
        return []
    r, whole = correlation(checks), all(check.whole for check in checks)
    if not whole and not r >= CORRELATED[1]:
        return []
    retrained = "" if whole else ", the last layer alone retrained"
    return [_judged(r, CORRELATED, f"predicted and actual correlate by {r:.2f} in {len(checks)} checks{retrained}")]


def _by_last_layer(checks: Sequence[SpotCheck]) -> list[tuple[str, str]]:
    if all(check.whole for check in checks) or len(checks) < FEWEST_CHECKS:
        return []
    said = f"predicted and actual correlate by {correlation(checks):.2f} in {len(checks)} checks"
    beyond = "what the layers in front would learn otherwise is in the scores, but not in the check"
    return [("last layer retrained alone", f"{said}; {beyond}")]


def correlation(checks: Sequence[SpotCheck]) -> float:
    """Return Pearson's correlation of predicted and actual; NaN where either does not vary."""
    predicted, actual = ([getattr(check, side) for check in checks] for side in ("predicted", "actual"))
    if len(set(predicted)) < 2 or len(set(actual)) < 2:
        return math.nan
    return float(np.corrcoef(predicted, actual)[0, 1])


def _judged(value: float, bounds: tuple[float, float], said: str) -> Finding:
    poor, doubtful = bounds
    return Finding("poor" if value < poor else "good" if value >= doubtful else "doubtful", said)


def _agreed(name: str, share: float) -> str:
    known = "an unknown share" if math.isnan(share) else f"{share:.0%}"
    return f"each query's strongest samples agree by {known} with those at {name}"


def _rows(found: Influence, duplicates: Sequence[Duplicate]) -> tuple[tuple[str, str], ...]:
    origin = [note for note in found.notes if note.startswith("damping: ")]
    why = [note for note in found.notes if " was chosen: " in note]
    notes = [note for note in found.notes if note not in (*origin, *why)]
    damping = "none" if math.isnan(found.damping) else f"{found.damping:.3g}"
    return (
        ("method", "; ".join((found.method, *why))),
        ("unit of the scores", "none: only their order means something" if found.unit == "none" else found.unit),
        ("training samples scored", f"{found.n_scored:,}"),
        ("curvature estimated from", f"{found.curvature_n:,} training samples" if found.curvature_n else "none"),
        ("damping λ", "; ".join((damping, *(note.removeprefix("damping: ") for note in origin)))),
        ("parameters covered", f"{found.coverage:.1%} ({found.covered_elements:,} numbers)"),
        *([("left out", _left_out(found))] if found.left_out else []),
        (
            "norm of the mean training gradient",
            "not taken: these scores expect no optimum"
            if math.isnan(found.gradient_norm)
            else f"{found.gradient_norm:.3g} (0 at an optimum, where influence functions hold)",
        ),
        *(("agreement", _agreed(name, share)) for name, share in found.agreement.items()),
        *(("duplicate", _told(duplicate)) for duplicate in duplicates),
        *(("note", note) for note in (*notes, *found.doubts)),
    )


def _told(duplicate: Duplicate) -> str:
    score = "was not kept" if math.isnan(duplicate.score) else f"is {duplicate.score:+.2e}"
    label = ", under another label" if duplicate.contradicts else ""
    return f"query #{duplicate.query} is training sample #{duplicate.train_index}{label}: its own score {score}"


def _left_out(found: Influence) -> str:
    """Return each parameter that is left out, with its share of all elements, the largest first."""
    total = found.covered_elements + sum(found.left_out.values())
    ranked = sorted(found.left_out.items(), key=lambda held: -held[1])
    named = [f"{name} {count / total:.1%}" for name, count in ranked[:MOST_NAMED]]
    rest = ranked[MOST_NAMED:]
    more = [f"{len(rest)} others {sum(count for _, count in rest) / total:.1%}"] if rest else []
    return ", ".join(named + more)
