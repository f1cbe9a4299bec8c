"""Exact generalised Gauss–Newton matrix, in the parameters' space or in that of its columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lightning_interp.checks import check_counts
from lightning_interp.data.samples import Samples
from lightning_interp.influence.curvature.curvature import Gradients, Scorer, Shift, spread_out, sum_of
from lightning_interp.influence.gradients.factored import FactoredGradients, concatenate_samples, dot_products
from lightning_interp.influence.gradients.reader import Reader

MOST_PARAMETERS_FOR_MATRIX = 8192  # 512 MB in float64
LARGEST_VECTOR = 2**20  # elements, 4 MB of float32, of a column that is stored as a gradient instead of factors
LARGEST_SOLUTION = 2**25  # elements, 128 MB of float32 for all solved queries


@dataclass(frozen=True)
class GaussNewton:
    """The whole generalised Gauss–Newton matrix H = (1/n) Σ JᵀH_ℓJ, curvature between layers included.

    For cross entropy it is the Fisher matrix, for a linear model the Hessian. With all columns it is a matrix over the
    parameters, of which there may be 8,192. With a number of columns, H = (1/n) C Cᵀ is inverted in their space,
    (H + λ)⁻¹ = (I − C (nλ I + CᵀC)⁻¹ Cᵀ)/λ: only dot products of gradients are needed, which factor, so that it is
    cheaper than any approximation by layers where the columns are few, and its memory does not grow with n.

    Reference: Martens, New Insights and Perspectives on the Natural Gradient Method, 2020; Dangel et al., ViViT:
    Curvature Access Through the Generalized Gauss-Newton's Low-Rank Structure, 2022.

    Args:
        columns: how many columns it is computed from: an unbiased sample, which contains the large ones (see
            `PrioritySample`); every column of every sample when None.
        samples: training samples, evenly spread, that it is computed from; all when None.
        seed: of the sample.
    """

    columns: int | None = None
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts("GaussNewton", columns=self.columns, samples=self.samples)

    def check(self, parameters: int) -> None:
        """Raise an error if there are too many parameters.

        Raises:
            ValueError: there are more than 8,192, and `columns` is None.
        """
        if self.columns is None and parameters > MOST_PARAMETERS_FOR_MATRIX:
            raise ValueError(
                f"GaussNewton: expected at most {MOST_PARAMETERS_FOR_MATRIX} covered parameters, got {parameters};"
                " pass GaussNewton(columns=1024)"
            )

    def fit(self, reader: Reader, samples: Samples) -> FittedMatrix | FittedColumns:
        """Sum the matrix over all samples, or gather its columns.

        Raises:
            ValueError: there are too many parameters.
        """
        subset = spread_out(samples, self.samples)
        self.check(reader.coverage.size)
        if self.columns is None:
            matrix = _sum_of_outer_products(reader.gradients_of_all_columns(subset, self.seed, "curvature"))
            return FittedMatrix(matrix / len(subset), reader.coverage.shapes, len(subset))
        columns = reader.sample_columns(subset, self.columns, self.seed)
        rows = gather(reader.gradients_of_columns(subset, columns, "curvature"))
        return FittedColumns(rows, columns.n, reader.coverage.size, columns.notes)


@dataclass(frozen=True, eq=False)
class FittedMatrix:
    """The matrix over the parameters.

    Args:
        matrix: `(p, p)`, float64.
        shapes: block → shape of a gradient, in their order.
        n: number of samples used.
        notes: what to say of it.
    """

    matrix: Tensor
    shapes: Mapping[str, tuple[int, int, int]]
    n: int
    notes: tuple[str, ...] = ()

    @property
    def mean_eigenvalue(self) -> float:
        """Mean over all eigenvalues."""
        return float(self.matrix.diagonal().mean())

    def inverse(self, shift: Shift) -> DenseInverse:
        """Return (H + Λ)⁻¹."""
        diagonal = torch.cat([_damping_diagonal(shift[block], shape) for block, shape in self.shapes.items()])
        return DenseInverse(cholesky(self.matrix + diagonal.diag()), tuple(self.shapes))


@dataclass(frozen=True, eq=False)
class DenseInverse:
    """(H + Λ)⁻¹ of a matrix over the parameters.

    Args:
        factor: its Cholesky factor, `(p, p)`, float64.
        blocks: names of the blocks, in their order.
    """

    factor: Tensor
    blocks: tuple[str, ...]

    def against(self, queries: Gradients) -> Scorer:
        """Return a function: gradients of m samples → ∇ℓ_qᵀ (H + Λ)⁻¹ ∇ℓ_i, `(q, m)`."""
        solved = self._solved(queries)
        return lambda rows: solved @ self._flat(rows).T.to(solved)

    def solve(self, rows: Gradients) -> dict[str, Tensor]:
        """Return (H + Λ)⁻¹ ∇ℓ of each sample: block → `(q, groups, o, i)`."""
        ordered = {block: rows[block] for block in self.blocks}
        vectors = self._solved(rows).split([row.size for row in ordered.values()], dim=1)
        pairs = zip(ordered.items(), vectors, strict=True)
        return {block: vector.reshape(-1, *row.shape) for (block, row), vector in pairs}

    def squares(self, rows: Gradients) -> Tensor:
        """Return ∇ℓ_iᵀ (H + Λ)⁻¹ ∇ℓ_i of each sample, `(n,)`."""
        # gᵀ (L Lᵀ)⁻¹ g = |L⁻¹ g|²: one triangular system instead of two.
        half = torch.linalg.solve_triangular(self.factor, self._flat(rows).T, upper=False)
        return half.square().sum(0).to(next(iter(rows.values())).outputs)

    def _solved(self, rows: Gradients) -> Tensor:
        like = next(iter(rows.values())).outputs
        return torch.cholesky_solve(self._flat(rows).T, self.factor).T.to(like)

    def _flat(self, rows: Gradients) -> Tensor:
        return flatten({block: rows[block] for block in self.blocks}).cpu().double()


@dataclass(frozen=True, eq=False)
class FittedColumns:
    """The matrix as H = (1/n) C Cᵀ.

    Args:
        rows: the columns of C, as gradients of each block.
        n: number of samples that they represent.
        elements: number of parameters' elements.
        notes: what to say of it.
    """

    rows: Gradients
    n: int
    elements: int
    notes: tuple[str, ...] = ()

    @property
    def mean_eigenvalue(self) -> float:
        """Mean over all eigenvalues."""
        return sum(float(row.squared_norms().sum()) for row in self.rows.values()) / (self.n * self.elements)

    def inverse(self, shift: Shift) -> ColumnsInverse:
        """Return (H + Λ)⁻¹."""
        rows = whiten(self.rows, shift)
        # Factored in float64: where the damping is small, DᵀD is far above nI.
        kernel = sum_of(dot_products(row, row) for row in rows.values()).cpu().double()
        kernel.diagonal().add_(self.n)
        return ColumnsInverse(rows, shift, cholesky(kernel))


@dataclass(frozen=True, eq=False)
class ColumnsInverse:
    """(H + Λ)⁻¹ = Λ^−½ (I − D (nI + DᵀD)⁻¹ Dᵀ) Λ^−½ with D = Λ^−½ C.

    Args:
        rows: the columns of D.
        shift: Λ.
        factor: Cholesky factor of nI + DᵀD, `(r, r)`, float64.
    """

    rows: Gradients
    shift: Shift
    factor: Tensor

    def against(self, queries: Gradients) -> Scorer:
        """Return a function: gradients of m samples → ∇ℓ_qᵀ (H + Λ)⁻¹ ∇ℓ_i, `(q, m)`."""
        if self._vectors_are_cheaper(queries):
            vectors = self.solve(queries)
            return lambda rows: sum_of(rows[block].dot(vectors[block]) for block in vectors)
        white, solved = self._in_columns(queries)

        def score(rows: Gradients) -> Tensor:
            rows = whiten(rows, self.shift)
            triples = ((white[b], self.rows[b], row) for b, row in rows.items())
            return sum_of(dot_products(q, row) - solved @ dot_products(c, row) for q, c, row in triples)

        return score

    def solve(self, rows: Gradients) -> dict[str, Tensor]:
        """Return (H + Λ)⁻¹ ∇ℓ of each sample: block → `(q, groups, o, i)`."""
        white, solved = self._in_columns(rows)
        vectors = {}
        for block, row in white.items():
            projected = torch.stack([self.rows[block].scale(weights).sum() for weights in solved])
            remaining = row.gradients().flatten(1) - projected.flatten(1)
            vectors[block] = (remaining * inverse_root(self.shift[block], remaining)).reshape(-1, *rows[block].shape)
        return vectors

    def squares(self, rows: Gradients) -> Tensor:
        """Return ∇ℓ_iᵀ (H + Λ)⁻¹ ∇ℓ_i of each sample, `(n,)`."""
        rows = whiten(rows, self.shift)
        dots = sum_of(dot_products(self.rows[block], row) for block, row in rows.items())
        half = torch.linalg.solve_triangular(self.factor, dots.cpu().double(), upper=False)
        norms = sum_of(row.squared_norms() for row in rows.values())
        return norms - half.square().sum(0).to(norms)

    def _in_columns(self, queries: Gradients) -> tuple[dict[str, FactoredGradients], Tensor]:
        """Return Λ^−½ ∇ℓ, laid out as the columns are, and (nI + DᵀD)⁻¹ Dᵀ Λ^−½ ∇ℓ, `(q, r)`."""
        white = whiten(queries, self.shift)
        white = {b: q if q.shape == self.rows[b].shape else q.as_vectors() for b, q in white.items()}
        dots = sum_of(dot_products(white[block], row) for block, row in self.rows.items())
        return white, torch.cholesky_solve(dots.T.cpu().double(), self.factor).T.to(dots)

    def _vectors_are_cheaper(self, queries: Gradients) -> bool:
        """Say whether a training sample's products with solved queries cost less than those with all columns."""
        pairs = [(row, self.rows[block]) for block, row in queries.items()]
        if sum(len(row) * row.size for row, _ in pairs) > LARGEST_SOLUTION:
            return False
        by_vectors = sum((len(row) + row.positions) * row.size for row, _ in pairs)
        by_columns = sum((len(row) + len(columns)) * _dot_product_cost(row, columns) for row, columns in pairs)
        return by_vectors < by_columns


def whiten(rows: Gradients, shift: Shift) -> dict[str, FactoredGradients]:
    """Return Λ^−½ g, factored where Λ is one number for a block."""
    return {block: _whiten_block(row, shift[block]) for block, row in rows.items()}


def inverse_root(shift: float | Tensor, like: Tensor) -> float | Tensor:
    """Return Λ^−½ of a block: a number, or `(elements,)` in the type of `like`."""
    return shift.rsqrt().reshape(-1).to(like) if isinstance(shift, Tensor) else shift**-0.5


def gather(gradients_of_batches: Iterable[dict[str, FactoredGradients]]) -> dict[str, FactoredGradients]:
    """Return all rows of a pass, each block as factors or as whole gradients, whichever is cheaper to multiply."""
    batches_of_blocks: dict[str, list[FactoredGradients]] = {}
    as_vectors: dict[str, bool] = {}
    for rows in gradients_of_batches:
        for block, row in rows.items():
            cheaper = row.positions**2 * sum(row.shape[1:]) >= row.size and row.size <= LARGEST_VECTOR
            # The first batch decides for all, so that a block's rows can be stacked.
            as_vector = as_vectors.setdefault(block, cheaper)
            batches_of_blocks.setdefault(block, []).append(row.as_vectors() if as_vector else row)
    return {block: concatenate_samples(batches) for block, batches in batches_of_blocks.items()}


def _dot_product_cost(row: FactoredGradients, columns: FactoredGradients) -> int:
    """Return how many multiplications one product of two gradients takes, by factors or as vectors."""
    return min(row.positions * columns.positions * sum(row.shape[1:]) * row.shape[0], row.size)


def cholesky(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor of a damped curvature.

    Raises:
        FloatingPointError: it is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    # An infinite entry passes without `info`.
    if int(info) or not bool(factor.diagonal().isfinite().all()):
        raise FloatingPointError("damping: the damped curvature is not positive definite; pass a larger damping=")
    return factor


def flatten(rows: Gradients) -> Tensor:
    """Return all blocks' per-sample gradients side by side, `(n, p)`."""
    return torch.cat([row.gradients().flatten(1) for row in rows.values()], dim=1)


def _damping_diagonal(shift: float | Tensor, shape: tuple[int, int, int]) -> Tensor:
    if isinstance(shift, Tensor):
        return shift.cpu().double().flatten()
    return torch.full((prod(shape),), shift, dtype=torch.float64)


def _sum_of_outer_products(gradients_of_batches: Iterable[dict[str, FactoredGradients]]) -> Tensor:
    matrix: Tensor | None = None
    for rows in gradients_of_batches:
        gradients = flatten(rows)
        # Multiplied in the gradients' precision, summed over batches in float64.
        product = (gradients.T @ gradients).cpu().double()
        matrix = product if matrix is None else matrix.add_(product)
    if matrix is None:
        raise ValueError("train: expected samples to take the curvature from, got none")
    return matrix


def _whiten_block(row: FactoredGradients, shift: float | Tensor) -> FactoredGradients:
    root = inverse_root(shift, row.outputs)
    if isinstance(root, Tensor):
        return FactoredGradients(row.outputs.new_ones(len(row), 1, 1, 1), row.as_vectors().outputs * root)
    return FactoredGradients(row.inputs, row.outputs * root)
