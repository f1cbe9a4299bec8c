"""Curvature of the loss with respect to the model's outputs, as columns to send through a backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.batch import precise
from lightning_interp.influence.gradients import Rows, Trace
from lightning_interp.task import Task, loss_per_sample

MOST_ENUMERATED = 64
MOST_OUTPUTS = 512
DRAWS = 8


def pseudo_gradients(trace: Trace, task: Task) -> Iterator[dict[str, Rows]]:
    """Yield rows whose squared gradients sum to each sample's generalised Gauss–Newton matrix JᵀHJ.

    One backward per column of a root of H, the loss's Hessian in the outputs: no label is sampled.
    """
    columns = hessian_root(trace.outputs, trace.targets, task)
    for column in columns.unbind(2):
        weights = column.reshape(trace.outputs.shape).to(trace.outputs)
        yield trace.rows(trace.outputs, weights, keep=True)


def hessian_root(outputs: Tensor, targets: Tensor, task: Task) -> Float[Tensor, "n p k"]:
    """Return R with R Rᵀ = ∂²ℓ_n/∂f_n² for each sample's p outputs.

    Exact, with k ≤ p columns, except where `is_mixed`: then k = 8 random ±1 mixtures of the exact root's columns, right
    in the mean; drawn from the global generator.

    Raises:
        ValueError: there are more than 512 outputs per sample, and they are not classes.
    """
    outputs = precise(outputs.detach())
    if is_mixed(outputs, targets, task):
        return _mixed_softmax_root(outputs)
    if outputs[0].numel() > MOST_OUTPUTS:
        raise ValueError(
            f"outputs: expected at most {MOST_OUTPUTS} numbers per sample unless they are classes, got"
            f" {outputs[0].numel()}; pass task=Task(outputs=...) that reduces them"
        )
    hessian = _hessian(outputs, targets, task).cpu().double()
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    root = vectors * values.clamp(min=0).sqrt()[:, None, :]
    alive = root.abs().amax(dim=(0, 1)) > 1e-9 * root.abs().max()
    return root[:, :, alive if alive.any() else slice(1)].to(outputs.dtype).to(outputs.device)


def is_mixed(outputs: Tensor, targets: Tensor, task: Task) -> bool:
    """Say whether there are more than 64 classes under the default cross entropy, so that they are not enumerated."""
    many = outputs.ndim == 2 and outputs.shape[1] > MOST_ENUMERATED
    return many and task.loss is loss_per_sample and task.problem(outputs, targets) == "classes"


def _hessian(outputs: Tensor, targets: Tensor, task: Task) -> Tensor:
    leaf = outputs.clone().requires_grad_()
    (grad,) = torch.autograd.grad(task.per_sample(leaf, targets).sum(), leaf, create_graph=True)
    rows = grad.reshape(len(grad), -1)
    if not rows.requires_grad:
        return rows.new_zeros(*rows.shape, rows.shape[1])
    columns = [torch.autograd.grad(rows[:, j].sum(), leaf, retain_graph=True)[0] for j in range(rows.shape[1])]
    return torch.stack([column.reshape(len(column), -1) for column in columns], dim=2)


def _mixed_softmax_root(logits: Tensor) -> Tensor:
    """Return mixtures of the columns √p_c (e_c − p), whose outer products sum to diag p − p pᵀ."""
    chance = logits.softmax(1)[:, :, None]
    signs = torch.randint(0, 2, (*logits.shape, DRAWS), device=logits.device) * 2.0 - 1
    mixed = chance.sqrt() * signs
    return (mixed - chance * mixed.sum(1, keepdim=True)) / DRAWS**0.5
