"""Saliency: the gradient of the target's logit with respect to the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.attribution.target import Target, recorded, select, with_leaf
from lightning_interp.batch import precise
from lightning_interp.capture import differentiable, hooked
from lightning_interp.display import main_tensor
from lightning_interp.records import Explanation
from lightning_interp.task import Task


@dataclass(frozen=True)
class Saliency:
    """Gradient of the target's logit (not of its probability) with respect to the input.

    map = ∂ logit_target / ∂x, signed, in the shape of x; shown as the largest absolute value over channels. For
    token ids, the norm over the embedding's dimensions of the gradient at the output of the embedding that reads
    them, `(n, tokens)`. It says where a small change would move the logit, not what the logit is made of, and is
    noisy where the network has many ReLUs.

    Reference: Simonyan et al., Deep Inside Convolutional Networks, 2013.

    >>> net = nn.Linear(3, 2, bias=False)
    >>> maps = Saliency()(net, torch.ones(1, 3), torch.tensor([1])).maps
    >>> bool(torch.equal(maps[0], net.weight.detach()[1]))
    True
    """

    @property
    def name(self) -> str:
        """Tag of the method."""
        return "Saliency"

    def __call__(self, model: nn.Module, inputs: Any, target: Target, task: Task = Task()) -> Explanation:
        """Explain each sample of a batch by itself; the model is left as it was.

        Args:
            model: any module; it runs in eval mode.
            inputs: what `task.outputs(model, ...)` takes, on the model's device.
            target: class per sample `(n,)`, or a function outputs → `(n,)`.
            task: how to call the model.

        Raises:
            ValueError: the target does not fit, or the outputs do not depend on the input by a gradient.
        """
        explained = main_tensor(inputs, lead=1)
        with differentiable(model):
            fresh, leaf = with_leaf(inputs, explained)
            if leaf.is_floating_point():
                scores = select(task.outputs(model, fresh), target)
                maps = gradient(scores, leaf)
            else:
                maps = _at_embedding(model, fresh, leaf, target, task)
        return Explanation(self.name, precise(maps.detach()).cpu(), recorded(target, len(maps)))


def gradient(scores: Tensor, leaf: Tensor) -> Tensor:
    """Return ∂ Σ scores / ∂ leaf: each sample's own gradient, since no sample's score sees another.

    Raises:
        ValueError: no gradient flows.
    """
    if not scores.requires_grad:
        raise ValueError("model: expected outputs with a gradient, got none (is part of forward under no_grad?)")
    (found,) = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)
    if found is None:
        raise ValueError("model: expected outputs that depend on the explained input, but no gradient reaches it")
    return found


def _at_embedding(model: nn.Module, inputs: Any, ids: Tensor, target: Target, task: Task) -> Tensor:
    leaves: list[Tensor] = []

    def hook(_: str, __: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if leaves or not given or given[0].shape != ids.shape or not torch.equal(given[0], ids):
            return None
        leaves.append(output.detach().requires_grad_())
        return leaves[0].clone()

    embeddings = [name for name, part in model.named_modules() if isinstance(part, nn.Embedding)]
    with hooked(model, embeddings, hook):
        scores = select(task.outputs(model, inputs), target)
    if not leaves:
        raise ValueError("inputs: expected floats, or token ids that an nn.Embedding of the model reads")
    return gradient(scores, leaves[0]).norm(dim=-1)
