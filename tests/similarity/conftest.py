"""The test case of the golden numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    r = np.random.RandomState(0)
    x, a = r.randn(200, 30), r.randn(30, 20)
    y = x @ a + 0.5 * r.randn(200, 20)
    return torch.tensor(x), torch.tensor(y)
