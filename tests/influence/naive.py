"""Slow transcriptions: gradients, Jacobians and curvature, one sample and one output at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_interp import Task


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def flat_grad(of: Tensor, at: Sequence[Tensor]) -> Tensor:
    grads = torch.autograd.grad(of, at, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def gradients(net: nn.Module, data: TensorDataset, task: Task) -> Tensor:
    """∇ℓ_i of each sample, `(n, p)`."""
    rows = (task.losses(net, tuple(part[i : i + 1] for part in data.tensors))[2].sum() for i in range(len(data)))
    return torch.stack([flat_grad(loss, trained(net)) for loss in rows])


def ggn(net: nn.Module, data: TensorDataset, task: Task) -> Tensor:
    """(1/n) Σ Jᵀ H_ℓ J over all trained parameters, `(p, p)`."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(data)):
        batch = tuple(part[i : i + 1] for part in data.tensors)
        outputs = task.outputs(net, task.inputs(batch))
        jacobian = torch.stack([flat_grad(value, trained(net)) for value in outputs.flatten()])
        curved = torch.autograd.functional.hessian(
            lambda o, batch=batch: task.per_sample(o, task.targets(batch)).sum(), outputs.detach()
        ).reshape(outputs.numel(), -1)
        total = total + jacobian.T @ curved @ jacobian
    return total / len(data)


def scores(matrix: Tensor, net: nn.Module, train: TensorDataset, query: TensorDataset, task: Task) -> Tensor:
    """(1/n) ∇ℓ_qᵀ matrix⁻¹ ∇ℓ_i, `(q, n)`."""
    right = gradients(net, train, task).T
    return gradients(net, query, task) @ torch.linalg.solve(matrix, right) / len(train)
