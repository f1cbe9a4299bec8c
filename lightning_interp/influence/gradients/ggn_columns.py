"""Columns of the generalised Gauss–Newton matrix: what to send through a backward, all of them or a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_interp.data.batch import at_least_float32
from lightning_interp.data.task import Task, loss_per_sample

MOST_OUTPUTS = 512
MOST_ENUMERATED = 4096
MIXTURES = 8


class Root(NamedTuple):
    """A root R of the loss's Hessian in the outputs, R Rᵀ = ∂²ℓ_n/∂f_n², one column after the other.

    Args:
        norms: squared norm of each column, `(n, k)`.
        column: rows and columns `(m,)` each → those columns, `(m, *shape of one sample's outputs)`.
    """

    norms: Float[Tensor, "n k"]
    column: Callable[[Tensor, Tensor], Tensor]


def hessian_root(outputs: Tensor, targets: Tensor, task: Task, draws: torch.Generator | None = None) -> Root:
    """Return a root of the loss's Hessian for each sample.

    Of cross entropy the Cholesky factor of diag p − p pᵀ, classes in falling order of p: column j is
    √(p_j q_{j+1}/q_j) (e_j − p_{>j}/q_{j+1}) with q_j = Σ_{i≥j} p_i, so that two classes in doubt need one column.
    Of classes at several positions `(n, classes, ...)` those of each position, or, where they would be over 4,096, 8
    random ±1 mixtures of all: right in the mean. Of binary cross entropy and squared error the diagonal's root. Of any
    other loss the eigenvectors.

    Reference: Tanabe & Sagae, An Exact Cholesky Decomposition and the Generalized Inverse of the Variance–Covariance
    Matrix of the Multinomial Distribution, 1992.

    Raises:
        ValueError: the loss is the user's own and there are more than 512 outputs per sample.
    """
    outputs = at_least_float32(outputs.detach())
    kind = task.problem(outputs, targets) if task.loss is loss_per_sample else None
    if kind == "classes":
        return _dense(_mixtures(outputs, draws)) if has_random_root(outputs, targets, task) else _softmax_root(outputs)
    if kind in ("binary", "multilabel", "regression"):
        return _diagonal_root(outputs, kind)
    return _dense(_eigenvectors(outputs, targets, task))


@dataclass(frozen=True, eq=False)
class CurvatureColumns:
    """Columns of the curvature's root, each of one sample: Σ_m v_m v_mᵀ estimates the sum over all of them.

    Args:
        sample_indices: which sample each is of, `(m,)`, ascending.
        vectors: in the outputs' shape, `(m, *shape of one sample's outputs)`, scaled so that the estimate is unbiased.
        total: how many there are in all.
        trace: share of the trace (in the outputs) that the kept ones hold themselves.
        n: samples that were looked at.
    """

    sample_indices: Int[Tensor, " m"]
    vectors: Float[Tensor, "m *shape"]
    total: int
    trace: float
    n: int

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what the sample is, unless it is everything."""
        if len(self.sample_indices) == self.total:
            return ()
        kept, total = len(self.sample_indices), self.total
        return (
            f"the curvature is an unbiased sample: {kept:,} of its {total:,} columns,"
            f" {100 * self.trace:.0f}% of its trace",
        )


class PrioritySample:
    """Keeps at most `count` columns of a stream: the large ones surely, the small ones by chance.

    Each column of squared norm w gets the priority w/u, u uniform. The `count` highest are kept, and stand for
    max(w, τ), τ the next priority: unbiased, in memory that does not grow with the stream.

    Reference: Duffield, Lund & Thorup, Priority Sampling for Estimation of Arbitrary Subset Sums, 2007.

    Args:
        count: how many to keep.
        draws: where u comes from.
    """

    def __init__(self, count: int, draws: torch.Generator) -> None:
        self._count, self._draws = count, draws
        self._held = Held()

    def add(self, root: Root, places: Int[Tensor, " n"]) -> None:
        """Take the columns of the next samples, which lie at these places."""
        norms = root.norms.detach().cpu().double()
        chance = 1 - torch.rand(norms.shape, generator=self._draws, dtype=torch.float64)
        rows, columns = (norms > 0).nonzero(as_tuple=True)
        priority = norms[rows, columns] / chance[rows, columns]
        best = (priority > self._held.threshold).nonzero()[:, 0]
        best = best[priority[best].topk(min(len(best), self._count + 1)).indices]
        rows, columns = rows[best], columns[best]
        device = root.norms.device
        found = root.column(rows.to(device), columns.to(device)).cpu()
        state = torch.stack([priority[best], norms[rows, columns], places[rows].double()])
        fresh = Held(state, found, int((norms > 0).sum()), float(norms.sum()), len(norms))
        self._held = self._held.with_(fresh)
        if self._held.state.shape[1] > 2 * self._count + 1:
            self._held = self._held.cut(self._count + 1)

    def held(self) -> Held:
        """Return what is kept so far, to be joined with what others keep."""
        return self._held.cut(self._count + 1)

    def columns(self, parts: Sequence[Held]) -> CurvatureColumns:
        """Return the sample of all parts together, each of which kept at least `count + 1` of its own.

        Raises:
            ValueError: there are no samples, or their curvature is zero.
        """
        held = Held()
        for part in parts:
            held = held.with_(part)
        if held.vectors is None:
            raise ValueError("train: expected samples to take the curvature from, got none")
        if not held.total:
            raise ValueError("train: the curvature of all samples is zero (is the softmax saturated?)")
        held = held.cut(self._count + 1)
        threshold = float(held.state[0].min()) if held.state.shape[1] > self._count else 0.0
        return held.cut(self._count).weighted(threshold)


class Held(NamedTuple):
    """Columns with their priorities, before they are weighted.

    Args:
        state: priority, squared norm and place of each, `(3, m)`.
        vectors: `(m, *shape)`.
        total: how many there were.
        norm: sum of all their squared norms.
        n: samples that were looked at.
    """

    state: Tensor = torch.zeros(3, 0, dtype=torch.float64)
    vectors: Tensor | None = None
    total: int = 0
    norm: float = 0.0
    n: int = 0

    @property
    def threshold(self) -> float:
        """The smallest priority once the sample was cut; nothing below can matter."""
        return float(self.state[0].min()) if self.total > self.state.shape[1] > 0 else 0.0

    def with_(self, other: Held) -> Held:
        """Return both together."""
        if self.vectors is None or other.vectors is None:
            return other if self.vectors is None else self
        return Held(
            torch.cat([self.state, other.state], dim=1),
            torch.cat([self.vectors, other.vectors]),
            self.total + other.total,
            self.norm + other.norm,
            self.n + other.n,
        )

    def cut(self, count: int) -> Held:
        """Return the `count` columns of the highest priority."""
        if self.vectors is None or self.state.shape[1] <= count:
            return self
        top = self.state[0].topk(count).indices
        return self._replace(state=self.state[:, top], vectors=self.vectors[top])

    def weighted(self, threshold: float) -> CurvatureColumns:
        """Return the columns, each scaled to what it stands for, in the order of their samples."""
        order = self.state[2].argsort(stable=True)
        state, vectors = self.state[:, order], self.vectors
        if vectors is None:
            raise ValueError("columns: expected at least one, got none")
        vectors = vectors[order]
        scale = (state[1].clamp(min=threshold) / state[1]).sqrt().to(vectors)
        vectors = vectors * scale.reshape(-1, *([1] * (vectors.ndim - 1)))
        share = float(state[1].sum()) / self.norm
        return CurvatureColumns(state[2].long(), vectors, self.total, share, self.n)


def has_random_root(outputs: Tensor, targets: Tensor, task: Task) -> bool:
    """Say whether the root is one of random mixtures: of classes at so many positions that not all are enumerated."""
    many = outputs.ndim > 2 and outputs[0].numel() > MOST_ENUMERATED
    return many and task.loss is loss_per_sample and task.problem(outputs, targets) == "classes"


def _softmax_root(logits: Float[Tensor, "n c *positions"]) -> Root:
    """Return the columns of each position, one position after the other: the loss is their mean."""
    n, classes = logits.shape[:2]
    apart = logits.reshape(n, classes, -1).transpose(1, 2)
    count, most = apart.shape[1], classes - 1
    one = _position_root(apart.reshape(n * count, classes))

    def column(rows: Tensor, places: Tensor) -> Tensor:
        where = places // most
        found = one.column(rows * count + where, places % most) / count**0.5
        spread = found.new_zeros(len(rows), classes, count)
        spread.scatter_(2, where[:, None, None].expand(-1, classes, 1), found[:, :, None])
        return spread.reshape(-1, *logits.shape[1:])

    return Root(one.norms.reshape(n, count * most) / count, column)


def _position_root(logits: Float[Tensor, "m c"]) -> Root:
    chance, order = logits.softmax(1).sort(dim=1, descending=True)
    left = chance.flip(1).cumsum(1).flip(1)
    tiny = torch.finfo(chance.dtype).tiny
    behind = torch.cat([left[:, 1:], left.new_zeros(len(left), 1)], dim=1)
    scale = chance * behind / left.clamp(min=tiny)
    squares = chance.square()
    after = squares.flip(1).cumsum(1).flip(1) - squares
    norms = scale * (1 + after.clamp(min=0) / behind.square().clamp(min=tiny))

    def column(rows: Tensor, places: Tensor) -> Tensor:
        later = torch.arange(chance.shape[1], device=chance.device)[None, :] > places[:, None]
        share = -(chance[rows] / behind[rows, places].clamp(min=tiny)[:, None]) * later
        share.scatter_(1, places[:, None], 1.0)
        found = torch.zeros_like(share).scatter_(1, order[rows], share)
        return found * scale[rows, places].sqrt()[:, None]

    return Root(norms[:, :-1], column)


def _diagonal_root(outputs: Tensor, kind: str) -> Root:
    """Return the root of a Hessian that is diagonal: the loss is a mean over a sample's outputs."""
    chance = outputs.sigmoid()
    curved = torch.full_like(outputs, 2.0) if kind == "regression" else chance * (1 - chance)
    flat = (curved / outputs[0].numel()).reshape(len(outputs), -1)

    def column(rows: Tensor, places: Tensor) -> Tensor:
        found = flat.new_zeros(len(rows), flat.shape[1])
        found.scatter_(1, places[:, None], flat[rows, places].sqrt()[:, None])
        return found.reshape(-1, *outputs.shape[1:])

    return Root(flat, column)


def _dense(columns: Float[Tensor, "n k *shape"]) -> Root:
    return Root(columns.flatten(2).square().sum(2), lambda rows, places: columns[rows, places])


def _mixtures(logits: Tensor, draws: torch.Generator | None) -> Tensor:
    """Return mixtures of the columns √(p_c / t) (e_c − p) of all t positions, `(n, 8, classes, ...)`."""
    chance = logits.softmax(1)[:, None]
    signs = torch.randint(0, 2, (len(logits), MIXTURES, *logits.shape[1:]), generator=draws).to(logits) * 2 - 1
    mixed = chance.sqrt() * signs
    return (mixed - chance * mixed.sum(2, keepdim=True)) / (MIXTURES * logits[0, 0].numel()) ** 0.5


def _eigenvectors(outputs: Tensor, targets: Tensor, task: Task) -> Tensor:
    if outputs[0].numel() > MOST_OUTPUTS:
        raise ValueError(
            f"outputs: expected at most {MOST_OUTPUTS} numbers per sample with a loss of your own, got"
            f" {outputs[0].numel()}; pass task=Task(outputs=...) that reduces them"
        )
    hessian = _hessian(outputs, targets, task).cpu().double()
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    root = (vectors * values.clamp(min=0).sqrt()[:, None, :]).mT
    return root.reshape(len(outputs), -1, *outputs.shape[1:]).to(outputs)


def _hessian(outputs: Tensor, targets: Tensor, task: Task) -> Tensor:
    leaf = outputs.clone().requires_grad_()
    (grad,) = torch.autograd.grad(task.per_sample(leaf, targets).sum(), leaf, create_graph=True)
    rows = grad.reshape(len(grad), -1)
    if not rows.requires_grad:
        return rows.new_zeros(*rows.shape, rows.shape[1])
    columns = [torch.autograd.grad(rows[:, j].sum(), leaf, retain_graph=True)[0] for j in range(rows.shape[1])]
    return torch.stack([column.reshape(len(column), -1) for column in columns], dim=2)
