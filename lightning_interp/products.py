"""X Xᵀ, exact in its precision and with half of the work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

LEAF = 64


def symmetric_product(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Return X Xᵀ, only the blocks on and below the diagonal computed where that saves time: on the CPU.

    Whatever `torch.set_float32_matmul_precision` says, float32 on the CPU stays float32.
    """
    if x.device.type != "cpu":
        return x @ x.T
    product = x.new_empty(len(x), len(x))
    with torch.no_grad(), _full_precision():
        _lower(x, product)
    return product.tril_().add_(product.tril(-1).T)


def _lower(x: Float[Tensor, "n d"], product: Float[Tensor, "n n"]) -> None:
    """Fill the lower blocks: halves of halves, so that what is computed nears one half."""
    half = len(x) // 2
    if half < LEAF:
        product.copy_(_times(x, x))
        return
    _lower(x[:half], product[:half, :half])
    _lower(x[half:], product[half:, half:])
    product[half:, :half] = _times(x[half:], x[:half])


def _times(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
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


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Keep float32 products from being rounded to bfloat16 or TensorFloat-32."""
    setting = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 and newer
    if setting is None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    precision = setting.fp32_precision
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = precision
