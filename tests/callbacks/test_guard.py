"""Progress follows the trainer's own bar, and cost is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from lightning_interp import DataInfluence
from lightning_interp.callbacks.trainer_data import progress_of
from lightning_interp.progress import bar, quiet
from tests.models import Net, loaders, trainer


def test_progress_respects_the_trainers_bar(tmp_path: Path) -> None:
    assert progress_of(trainer(tmp_path, enable_progress_bar=False)) is quiet
    assert progress_of(trainer(tmp_path, enable_progress_bar=True)) is bar
    assert progress_of(trainer(tmp_path, enable_progress_bar=True, callbacks=[TQDMProgressBar()])) is bar
    off = TQDMProgressBar()
    fit = trainer(tmp_path, enable_progress_bar=True, callbacks=[off])
    off.disable()
    assert progress_of(fit) is quiet


@pytest.mark.parametrize("shown", [True, False])
def test_long_work_shows_a_bar_or_nothing(shown: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fit = trainer(tmp_path, max_epochs=1, enable_progress_bar=shown, callbacks=[DataInfluence(queries=1)])
    fit.fit(Net(), *loaders())
    said = capfd.readouterr().err
    for work in ("choosing queries", "curvature", "scoring training samples"):
        assert (work in said) == shown
