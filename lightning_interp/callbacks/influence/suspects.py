"""Which training samples to look at first: those whose own loss hangs most on themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from lightning_interp.data.samples import Samples
from lightning_interp.data.task import Problem, Task
from lightning_interp.influence.results import SelfInfluence
from lightning_interp.views.canvas import Pixels
from lightning_interp.views.describe import target_in_words, view_by_index
from lightning_interp.views.display import Display
from lightning_interp.views.influence import suspects_sheet
from lightning_interp.views.sample import columns_of
from lightning_interp.views.sample_html import SuspectSample, sample_html

SHOWN = 24
ROWS_IN_CSV = 100_000


class SuspectRow(NamedTuple):
    """A line of the table: `suggested` is empty and `chance` NaN where there are no classes."""

    rank: int
    train_index: int
    train_id: str
    label: str
    suggested: str
    chance: float
    score: float
    loss: float


def suspects_of(
    model: nn.Module, task: Task, found: SelfInfluence, train: Samples, display: Display, shown: int = SHOWN
) -> list[SuspectSample]:
    """Return the training samples with the largest self-influence, each with the label that the network suggests."""
    first = found.first(shown)
    ids = found.ids[first].tolist()
    held = view_by_index(model, task, train, ids, display)
    columns = columns_of(held[ids[0]].value) if ids else None
    return [
        SuspectSample(
            held[index],
            float(found.chance[place]),
            float(found.scores[place]),
            sample_html(held[index].value, display, columns),
        )
        for index, place in zip(ids, first.tolist(), strict=True)
    ]


def suspects_picture(suspects: list[SuspectSample], of: int, display: Display) -> Pixels | None:
    """Return them as one picture; None where there are none.

    Args:
        suspects: as `suspects_of` gives.
        of: number of training samples.
        display: how samples are shown.
    """
    if not suspects:
        return None
    title = f"look at these first: the {len(suspects)} of {of:,} training samples with the largest self-influence"
    return suspects_sheet(suspects, title, display)


def suspect_rows(found: SelfInfluence, kind: Problem | None, display: Display) -> list[SuspectRow]:
    """Return the training samples by falling self-influence, at most 100,000."""
    places = found.first(ROWS_IN_CSV)
    labels = _words(found.targets[places], lambda target: target_in_words(target, kind, display))
    suggested = [""] * len(places) if found.suggested is None else _words(found.suggested[places], display.label)
    indices = found.ids[places].tolist()
    numbers = (values[places].tolist() for values in (found.chance, found.scores, found.losses))
    return [
        SuspectRow(rank, index, display.id(index), *rest)
        for rank, (index, *rest) in enumerate(zip(indices, labels, suggested, *numbers, strict=True), start=1)
    ]


def _words(targets: Tensor, word: Callable[[Tensor], str]) -> list[str]:
    """Return each target in words; equal ones are worded once."""
    distinct, which = targets.unique(dim=0, return_inverse=True)
    words = [word(target) for target in distinct]
    return [words[place] for place in which.tolist()]
