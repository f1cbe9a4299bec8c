"""Small networks whose layers, weights and losses try the per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_interp import Task
from lightning_interp.influence.gradients.coverage import Coverage, find_coverage
from lightning_interp.influence.gradients.per_sample import PerSampleGradients
from lightning_interp.network.undisturbed import differentiable

TASK = Task(kind="classes")


def per_sample(net: nn.Module, batch: tuple[Tensor, Tensor], task: Task = TASK) -> tuple[Coverage, float]:
    """Return what is covered, and the largest error of its gradients against autograd, one sample at a time."""
    worst = 0.0
    with differentiable(net):
        coverage = find_coverage(net, task, batch)
        rows = PerSampleGradients(coverage.watched_model, batch).loss_gradients()
        for sample in range(len(batch[1])):
            loss = task.losses(net, tuple(part[sample : sample + 1] for part in batch))[2].sum()
            for name, block in coverage.blocks.items():
                found = block.unpack(rows[name].gradients()[sample])
                held = [net.get_parameter(parameter) for parameter in block.parameters]
                for parameter, grad in zip(
                    block.parameters, torch.autograd.grad(loss, held, retain_graph=True), strict=True
                ):
                    scale = float(grad.abs().max().clamp(min=1e-30))
                    worst = max(worst, float((found[parameter] - grad).abs().max()) / scale)
    return coverage, worst


class Reused(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(self.fc(x).relu()).relu())


class Positions(nn.Module):
    """Linear layers at several positions, an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.fc(x.unflatten(1, (4, 6))), inplace=True).mean(1))


class Mean(nn.Module):
    """Mean over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


class SequenceFirst(nn.Module):
    """Samples along the second dimension, positions along the first, and as many of them as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.fc(x.unflatten(1, (3, 6)).transpose(0, 1))).mean(0))


class TiedTokens(nn.Module):
    """A table whose rows are also the output layer's weights; outputs over the vocabulary at the last token."""

    def __init__(self, scale: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.head.weight = self.table.weight
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale(self.mix(self.table(x)).sum(1)))


class Loose(nn.Module):
    """Parameters outside any layer: a matrix product of its own, a position embedding, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5) / 2)
        self.position = nn.Parameter(torch.randn(4, 6))
        self.scale = nn.Parameter(torch.rand(()) + 0.5)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.scale * ((x.unflatten(1, (4, 6)) + self.position) @ self.weight)).tanh().mean(1))


class Sneaky(nn.Module):
    """A weight also used outside its layer, two layers with one weight, a frozen one and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.frozen, self.unused = (nn.Linear(4, 4) for _ in range(3))
        self.tied, self.also, self.good = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.also.weight = self.tied.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(x) + F.linear(x, self.twice.weight)
        return self.good(self.also(self.tied(self.frozen(x)).tanh()))


def brute_force(
    net: nn.Module, train: TensorDataset, query: TensorDataset, damping: float, weights: Tensor | None = None
) -> Tensor:
    """(1/n) ∇ℓ_qᵀ (H + λ)⁻¹ ∇ℓ_i, H = (1/n) Σ JᵀH_ℓJ over all parameters, sample by sample; ℓ = w_y · cross entropy."""
    parameters = [p for p in net.parameters() if p.requires_grad]

    def flat(value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])

    def grads(data: TensorDataset) -> Tensor:
        losses = (
            F.cross_entropy(net(x[None]), y[None]) * (1 if weights is None else weights[y])
            for x, y in zip(*data.tensors, strict=True)
        )
        return torch.stack([flat(loss) for loss in losses])

    matrix = torch.zeros(())
    with differentiable(net):
        for x, y in zip(*train.tensors, strict=True):
            logits = net(x[None])[0]
            jacobian = torch.stack([flat(output) for output in logits])
            chance = logits.softmax(0).detach()
            curved = torch.diag(chance) - torch.outer(chance, chance)
            matrix = matrix + jacobian.T @ curved @ jacobian * (1 if weights is None else weights[y])
        matrix = matrix / len(train) + damping * torch.eye(len(matrix), dtype=matrix.dtype)
        return grads(query) @ torch.linalg.solve(matrix, grads(train).T) / len(train)
