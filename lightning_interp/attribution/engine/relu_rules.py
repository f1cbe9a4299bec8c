"""Rules for the backward of ReLUs: those of DeconvNet and of guided backpropagation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

Backward = Callable[[Tensor], Tensor]
PLAIN = {F.relu, torch.relu, Tensor.relu}
IN_PLACE = {torch.relu_, Tensor.relu_}
CLAMPS = {torch.clamp, Tensor.clamp, torch.clamp_min, Tensor.clamp_min, F.hardtanh, F.relu6}
CLAMPS_IN_PLACE = {torch.clamp_, Tensor.clamp_, torch.clamp_min_, Tensor.clamp_min_}


@dataclass(frozen=True)
class ReluRule:
    """A backward of ReLUs, for every ReLU of a forward, whichever module, function or method it is.

    ReLU6 and clamps from zero count as ReLUs, in-place calls included. Other activations keep their own gradient.

    Args:
        backward: (gradient, the ReLU's own backward) → gradient.
    """

    backward: Callable[[Tensor, Backward], Tensor]

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open the context in which the forward runs.

        Raises:
            ValueError: no ReLU was called.
        """
        with _RectifierMode(self) as mode:
            yield
        if not mode.met_rectifier:
            raise ValueError("model: expected ReLUs in forward, whose gradient this method changes, got none")


def pass_positive(gradient: Float[Tensor, " *n"], own: Backward) -> Float[Tensor, " *n"]:
    """Pass what is positive of the gradient."""
    return gradient.relu()


def pass_positive_where_active(gradient: Float[Tensor, " *n"], own: Backward) -> Float[Tensor, " *n"]:
    """Pass what is positive of the gradient, where the input was positive as well."""
    return own(gradient).relu()


DECONVNET = ReluRule(pass_positive)
GUIDED = ReluRule(pass_positive_where_active)


class _RectifierMode(TorchFunctionMode):
    def __init__(self, rule: ReluRule) -> None:
        super().__init__()
        self.rule, self.met_rectifier = rule, False

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        ceiling = rectifier_ceiling(func, args, kwargs)
        if ceiling is None:
            return func(*args, **kwargs)
        self.met_rectifier = True
        x = args[0] if args else kwargs["input"]
        in_place = func in IN_PLACE or func in CLAMPS_IN_PLACE or bool(_inplace(func, args, kwargs))
        return _Rectified.apply(x, self.rule, ceiling, in_place, func)  # type: ignore[no-untyped-call]


class _Rectified(torch.autograd.Function):
    """min(max(x, 0), ceiling), whose backward is the rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: ReluRule, ceiling: float, in_place: bool, func: Any) -> Tensor:
        ctx.rule, ctx.ceiling = rule, ceiling
        if in_place:
            ctx.mark_dirty(x)
        output = x.clamp_(0, ceiling) if in_place else x.clamp(0, ceiling)
        # Where x was positive can be read from x or from the output. What is saved is what the function itself would
        # save, so that models may write into the other one as they may without a rule.
        ctx.save_for_backward(output.clone() if func in CLAMPS_IN_PLACE else x if func in CLAMPS else output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (values,) = ctx.saved_tensors

        def own(gradient: Tensor) -> Tensor:
            if ctx.ceiling == float("inf"):
                return torch.ops.aten.threshold_backward(gradient, values, 0)
            return torch.ops.aten.hardtanh_backward(gradient, values, 0, ctx.ceiling)

        return ctx.rule.backward(gradient, own), None, None, None, None


def rectifier_ceiling(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | None:
    """Return the value above which a rectifier is flat (infinity for a ReLU); None for any other function."""
    if func in PLAIN or func in IN_PLACE:
        return float("inf")
    if func is F.relu6:
        return 6.0
    if func not in CLAMPS and func not in CLAMPS_IN_PLACE:
        return None
    names = ("min_val", "max_val") if func is F.hardtanh else ("min", "max")
    low, high = (kwargs.get(name, args[i] if len(args) > i else None) for i, name in enumerate(names, start=1))
    if isinstance(low, Tensor) or isinstance(high, Tensor) or low != 0:
        return None
    return float("inf") if high is None else float(high)


def _inplace(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the `inplace` flag of the functions that have one."""
    position = {F.relu: 1, F.relu6: 1, F.hardtanh: 3}.get(func)
    if position is None:
        return False
    return kwargs.get("inplace", args[position] if len(args) > position else False)
