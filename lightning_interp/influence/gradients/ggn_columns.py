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

MOST_OUTPUTS = 512  # of a user's own loss: an eigendecomposition of 512 × 512 numbers for every sample
MOST_ENUMERATED = 4096  # outputs per sample whose columns are all listed: each is a candidate in memory
MIXTURES = 8  # random columns in place of one for each class at each position


class Root(NamedTuple):
    """A root R of the loss's Hessian in the outputs, R Rᵀ = ∂²ℓ_n/∂f_n², one column after the other.

    Args:
        norms: squared norm of each column, `(n, k)`.
        column: rows and columns `(m,)` each → those columns, `(m, *shape of one sample's outputs)`.
    """

    norms: Float[Tensor, "n k"]
    column: Callable[[Tensor, Tensor], Tensor]


def hessian_root(outputs: Tensor, targets: Tensor, task: Task, generator: torch.Generator | None = None) -> Root:
    """Return a root of the loss's Hessian for each sample.

    Of cross entropy the Cholesky factor of diag p − p pᵀ, classes in falling order of p: column j is
    √(p_j q_{j+1}/q_j) (e_j − p_{>j}/q_{j+1}) with q_j = Σ_{i≥j} p_i, so that two likely classes need one column.
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
        if has_random_root(outputs, targets, task):
            return _enumerated_root(_random_mixtures(outputs, generator))
        return _softmax_root(outputs)
    if kind in ("binary", "multilabel", "regression"):
        return _diagonal_root(outputs, kind)
    return _enumerated_root(_eigenvector_columns(outputs, targets, task))


@dataclass(frozen=True, eq=False)
class CurvatureColumns:
    """Columns of the curvature's root, each of one sample: Σ_m v_m v_mᵀ estimates the sum over all of them.

    Args:
        sample_indices: which sample each is of, `(m,)`, ascending.
        vectors: in the outputs' shape, `(m, *shape of one sample's outputs)`, scaled so that the estimate is unbiased.
        total: number of columns that they were sampled from.
        trace_share: share of the trace (in the outputs) that the sampled columns themselves make up.
        n: number of samples that were read.
    """

    sample_indices: Int[Tensor, " m"]
    vectors: Float[Tensor, "m *shape"]
    total: int
    trace_share: float
    n: int

    @property
    def notes(self) -> tuple[str, ...]:
        """How the columns were sampled; empty if all were taken."""
        count = len(self.sample_indices)
        if count == self.total:
            return ()
        return (
            f"the curvature is an unbiased sample: {count:,} of its {self.total:,} columns,"
            f" {100 * self.trace_share:.0f}% of its trace",
        )


class PrioritySample:
    """Samples at most `count` columns of a stream: the large ones with certainty, the small ones at random.

    Each column of squared norm w gets the priority w/u, u uniform. The `count` highest are sampled, with the weight
    max(w, τ), τ the next priority: unbiased, in memory that does not grow with the stream.

    Reference: Duffield, Lund & Thorup, Priority Sampling for Estimation of Arbitrary Subset Sums, 2007.

    Args:
        count: size of the sample.
        generator: where u comes from.
    """

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self._count, self._generator = count, generator
        self._columns = PrioritizedColumns()

    def add(self, root: Root, sample_indices: Int[Tensor, " n"]) -> None:
        """Take in the columns of the next samples, which have these indices."""
        norms = root.norms.detach().cpu().double()
        uniform = 1 - torch.rand(norms.shape, generator=self._generator, dtype=torch.float64)  # above 0, up to 1
        rows, columns = (norms > 0).nonzero(as_tuple=True)
        priority = norms[rows, columns] / uniform[rows, columns]
        candidates = (priority > self._columns.threshold).nonzero()[:, 0]
        # One more than the sample: the priority of the first column left out is τ.
        best = candidates[priority[candidates].topk(min(len(candidates), self._count + 1)).indices]
        rows, columns = rows[best], columns[best]
        device = root.norms.device
        vectors = root.column(rows.to(device), columns.to(device)).cpu()
        state = torch.stack([priority[best], norms[rows, columns], sample_indices[rows].double()])
        added = PrioritizedColumns(state, vectors, int((norms > 0).sum()), float(norms.sum()), len(norms))
        self._columns = self._columns.merge(added)
        # Cut only once in a while: a cut copies all vectors.
        if self._columns.state.shape[1] > 2 * self._count + 1:
            self._columns = self._columns.top(self._count + 1)

    def sampled_columns(self) -> PrioritizedColumns:
        """Return the columns sampled so far, to be merged with those of other ranks."""
        return self._columns.top(self._count + 1)

    def columns(self, ranks: Sequence[PrioritizedColumns]) -> CurvatureColumns:
        """Return the sample of all ranks together, each of which brings `count + 1` of its own if it has as many.

        Raises:
            ValueError: there are no samples, or their curvature is zero.
        """
        merged = PrioritizedColumns()
        for columns in ranks:
            merged = merged.merge(columns)
        if merged.vectors is None:
            raise ValueError("train: expected samples to take the curvature from, got none")
        if not merged.total:
            raise ValueError("train: the curvature of all samples is zero (is the softmax saturated?)")
        merged = merged.top(self._count + 1)
        threshold = float(merged.state[0].min()) if merged.state.shape[1] > self._count else 0.0
        return merged.top(self._count).weight(threshold)


class PrioritizedColumns(NamedTuple):
    """Columns with their priorities, before they are weighted.

    Args:
        state: priority, squared norm and sample index of each, `(3, m)`.
        vectors: `(m, *shape)`.
        total: number of columns that they were sampled from.
        norm: sum of all their squared norms.
        n: number of samples that were read.
    """

    state: Tensor = torch.zeros(3, 0, dtype=torch.float64)
    vectors: Tensor | None = None
    total: int = 0
    norm: float = 0.0
    n: int = 0

    @property
    def threshold(self) -> float:
        """The smallest priority once the sample was cut: no column with less can enter."""
        return float(self.state[0].min()) if self.total > self.state.shape[1] > 0 else 0.0

    def merge(self, added: PrioritizedColumns) -> PrioritizedColumns:
        """Return the columns of both together."""
        if self.vectors is None or added.vectors is None:
            return added if self.vectors is None else self
        return PrioritizedColumns(
            torch.cat([self.state, added.state], dim=1),
            torch.cat([self.vectors, added.vectors]),
            self.total + added.total,
            self.norm + added.norm,
            self.n + added.n,
        )

    def top(self, count: int) -> PrioritizedColumns:
        """Return the `count` columns of the highest priority."""
        if self.vectors is None or self.state.shape[1] <= count:
            return self
        indices = self.state[0].topk(count).indices
        return self._replace(state=self.state[:, indices], vectors=self.vectors[indices])

    def weight(self, threshold: float) -> CurvatureColumns:
        """Return the columns, each scaled to its weight, in the order of their samples."""
        order = self.state[2].argsort(stable=True)
        state, vectors = self.state[:, order], self.vectors
        if vectors is None:
            raise ValueError("columns: expected at least one, got none")
        vectors = vectors[order]
        scale = (state[1].clamp(min=threshold) / state[1]).sqrt().to(vectors)
        vectors = vectors * scale.reshape(-1, *([1] * (vectors.ndim - 1)))
        trace_share = float(state[1].sum()) / self.norm
        return CurvatureColumns(state[2].long(), vectors, self.total, trace_share, self.n)


def has_random_root(outputs: Tensor, targets: Tensor, task: Task) -> bool:
    """Say whether the root is one of random mixtures: of classes at so many positions that not all are enumerated."""
    many = outputs.ndim > 2 and outputs[0].numel() > MOST_ENUMERATED
    return many and task.loss is loss_per_sample and task.problem(outputs, targets) == "classes"


def _softmax_root(logits: Float[Tensor, "n c *positions"]) -> Root:
    """Return the columns of each position, one position after the other: the loss is their mean."""
    n, classes = logits.shape[:2]
    by_position = logits.reshape(n, classes, -1).transpose(1, 2)
    positions, columns = by_position.shape[1], classes - 1
    root = _position_root(by_position.reshape(n * positions, classes))

    def column(rows: Tensor, indices: Tensor) -> Tensor:
        position = indices // columns
        values = root.column(rows * positions + position, indices % columns) / positions**0.5
        spread = values.new_zeros(len(rows), classes, positions)
        spread.scatter_(2, position[:, None, None].expand(-1, classes, 1), values[:, :, None])
        return spread.reshape(-1, *logits.shape[1:])

    return Root(root.norms.reshape(n, positions * columns) / positions, column)


def _position_root(logits: Float[Tensor, "m c"]) -> Root:
    """Return the Cholesky factor of diag p − p pᵀ, likely classes first (see `hessian_root`)."""
    p, order = logits.softmax(1).sort(dim=1, descending=True)
    tiny = torch.finfo(p.dtype).tiny
    q = p.flip(1).cumsum(1).flip(1)  # summed from the small end, so that no digits of the small ones are lost
    q_next = torch.cat([q[:, 1:], q.new_zeros(len(q), 1)], dim=1)
    scale = p * q_next / q.clamp(min=tiny)
    squares = p.square()
    # The norms follow from sums of squares; no column is written out for them.
    squares_after = squares.flip(1).cumsum(1).flip(1) - squares
    norms = scale * (1 + squares_after.clamp(min=0) / q_next.square().clamp(min=tiny))

    def column(rows: Tensor, indices: Tensor) -> Tensor:
        later = torch.arange(p.shape[1], device=p.device)[None, :] > indices[:, None]
        entries = -(p[rows] / q_next[rows, indices].clamp(min=tiny)[:, None]) * later
        entries.scatter_(1, indices[:, None], 1.0)
        in_order_of_classes = torch.zeros_like(entries).scatter_(1, order[rows], entries)
        return in_order_of_classes * scale[rows, indices].sqrt()[:, None]

    return Root(norms[:, :-1], column)


def _diagonal_root(outputs: Tensor, kind: str) -> Root:
    """Return the root of a Hessian that is diagonal: the loss is a mean over a sample's outputs."""
    p = outputs.sigmoid()
    second_derivative = torch.full_like(outputs, 2.0) if kind == "regression" else p * (1 - p)
    diagonal = (second_derivative / outputs[0].numel()).reshape(len(outputs), -1)

    def column(rows: Tensor, indices: Tensor) -> Tensor:
        entries = diagonal.new_zeros(len(rows), diagonal.shape[1])
        entries.scatter_(1, indices[:, None], diagonal[rows, indices].sqrt()[:, None])
        return entries.reshape(-1, *outputs.shape[1:])

    return Root(diagonal, column)


def _enumerated_root(columns: Float[Tensor, "n k *shape"]) -> Root:
    return Root(columns.flatten(2).square().sum(2), lambda rows, indices: columns[rows, indices])


def _random_mixtures(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return mixtures of the columns √(p_c / t) (e_c − p) of all t positions, `(n, 8, classes, ...)`."""
    p = logits.softmax(1)[:, None]
    signs = torch.randint(0, 2, (len(logits), MIXTURES, *logits.shape[1:]), generator=generator).to(logits) * 2 - 1
    mixed = p.sqrt() * signs
    return (mixed - p * mixed.sum(2, keepdim=True)) / (MIXTURES * logits[0, 0].numel()) ** 0.5


def _eigenvector_columns(outputs: Tensor, targets: Tensor, task: Task) -> Tensor:
    if outputs[0].numel() > MOST_OUTPUTS:
        raise ValueError(
            f"outputs: expected at most {MOST_OUTPUTS} numbers per sample with a loss of your own, got"
            f" {outputs[0].numel()}; pass task=Task(outputs=...) that reduces them"
        )
    hessian = _hessian_in_outputs(outputs, targets, task).cpu().double()
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    # A loss that is not convex in the outputs has negative eigenvalues, which a Gauss–Newton matrix leaves out.
    root = (vectors * values.clamp(min=0).sqrt()[:, None, :]).mT
    return root.reshape(len(outputs), -1, *outputs.shape[1:]).to(outputs)


def _hessian_in_outputs(outputs: Tensor, targets: Tensor, task: Task) -> Tensor:
    leaf = outputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(task.per_sample(leaf, targets).sum(), leaf, create_graph=True)
    rows = gradient.reshape(len(gradient), -1)
    if not rows.requires_grad:  # a loss that is linear in the outputs
        return rows.new_zeros(*rows.shape, rows.shape[1])
    columns = [torch.autograd.grad(rows[:, j].sum(), leaf, retain_graph=True)[0] for j in range(rows.shape[1])]
    return torch.stack([column.reshape(len(column), -1) for column in columns], dim=2)
