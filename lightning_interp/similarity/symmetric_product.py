"""X Xᵀ, exact in its precision and with half of the work."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LEAF_ROWS = 64  # blocks of fewer rows cost more in calls than half of their product saves


def symmetric_product(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Return X Xᵀ, only the blocks on and below the diagonal computed where that saves time: on the CPU.

    Where `torch.set_float32_matmul_precision` allows less than float32, the product is one of float64.
    """
    if x.device.type != "cpu":
        return x @ x.T
    if x.dtype is torch.float32 and _may_round():
        return symmetric_product(x.double()).float()
    product = x.new_zeros(len(x), len(x))
    if x.numel():
        with torch.no_grad():
            _fill_lower(x, product)
    return product.tril_().add_(product.tril(-1).T)


def _fill_lower(x: Float[Tensor, "n d"], product: Float[Tensor, "n n"]) -> None:
    """Fill the lower blocks: halves of halves, so that what is computed nears one half."""
    half = len(x) // 2
    if half < LEAF_ROWS:
        product.copy_(_times_transposed(x, x))
        return
    _fill_lower(x[:half], product[:half, :half])
    _fill_lower(x[half:], product[half:, half:])
    product[half:, :half] = _times_transposed(x[half:], x[:half])


def _times_transposed(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Return X Yᵀ by oneDNN, where torch has it: on processors that MKL does not favour it is twice as fast."""
    if x.dtype is torch.float32 and _ONEDNN is not None and torch.backends.mkldnn.enabled:
        product: Tensor = _ONEDNN(x, y, None, "none", [], "")
        return product
    return x @ y.T


def _onednn() -> torch._ops.OpOverloadPacket | None:
    try:
        linear = torch.ops.mkldnn._linear_pointwise
        small = torch.ones(2, 3)
        works = torch.equal(linear(small, small, None, "none", [], ""), small @ small.T)
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    return linear if works else None


_ONEDNN = _onednn()


def _may_round() -> bool:
    """Say whether float32 products may be rounded to bfloat16 or TensorFloat-32, as the user allowed."""
    setting = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 and newer
    allowed = torch.get_float32_matmul_precision() if setting is None else setting.fp32_precision
    return allowed not in ("highest", "ieee", "none")
