"""Shapes in annotations are checked while tests run; everything is seeded, and small work stays on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
from jaxtyping import install_import_hook

install_import_hook(
    [f"lightning_interp.{room}" for room in ("similarity", "attribution", "influence")], "beartype.beartype"
)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

# As long as a hundred others: begun last, it would keep one worker busy while the others have nothing left to do.
LONGEST_TEST = "test_the_demo_learns_and_says_where_to_look"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.name != LONGEST_TEST)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Let bad input through to the package's own messages, as a user's run does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
