"""Runs that are about what is stored need no pictures."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def blank_heat_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write and log blank heat maps: drawing those of a run takes seconds, far longer than the run itself."""
    blank = np.full((8, 8, 3), 255, np.uint8)
    monkeypatch.setattr("lightning_interp.callbacks.similarity.report.heat_map", lambda table: blank)
