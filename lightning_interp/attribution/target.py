"""The number that an attribution explains, and the input it explains it by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_interp.batch import map_tensors

Target = Int[Tensor, " n"] | Callable[[Tensor], Tensor]


def select(outputs: Tensor, target: Target) -> Float[Tensor, " n"]:
    """Return one number per sample: the target class's logit, or what a callable makes of the outputs.

    A single logit stands for class 1, its negative for class 0; outputs with positions `(n, classes, ...)` are
    averaged over them.

    Raises:
        ValueError: classes are missing or out of range, or a callable gave another shape than `(n,)`.
    """
    n = outputs.shape[0]
    if callable(target):
        chosen = target(outputs)
        if chosen.shape != (n,):
            raise ValueError(f"target: expected a function giving shape ({n},), got {tuple(chosen.shape)}")
        return chosen
    if target.shape != (n,) or target.is_floating_point():
        raise ValueError(f"target: expected {n} class indices, got {tuple(target.shape)} of {target.dtype}")
    logits = outputs.reshape(n, -1) if outputs.ndim < 3 else outputs.flatten(2).mean(2)
    chosen = target.to(logits.device, copy=True)  # a tensor made in inference mode cannot be saved for a backward
    if logits.shape[1] == 1:
        return torch.where(chosen > 0, logits[:, 0], -logits[:, 0])
    if n and not 0 <= int(target.min()) <= int(target.max()) < logits.shape[1]:
        raise ValueError(f"target: expected classes 0 to {logits.shape[1] - 1}, got {target.tolist()}")
    return logits.gather(1, chosen[:, None])[:, 0]


def recorded(target: Target, n: int) -> Int[Tensor, " n"]:
    """Return the target classes for the record; −1 where a callable chose."""
    return torch.full((n,), -1) if callable(target) else target.detach().cpu().long()


def with_leaf(inputs: Any, explained: Tensor) -> tuple[Any, Tensor]:
    """Return a copy of model inputs in which one tensor is a fresh leaf that gradients flow to."""
    leaf = explained.detach().clone()
    if leaf.is_floating_point():
        leaf.requires_grad_()
    return map_tensors(lambda t: leaf if t is explained else t.detach().clone(), inputs), leaf
