"""Shapes in annotations are checked while tests run; everything is seeded."""

from __future__ import annotations

from jaxtyping import install_import_hook

install_import_hook(
    [f"lightning_interp.{room}" for room in ("similarity", "attribution", "influence", "records")], "beartype.beartype"
)

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
