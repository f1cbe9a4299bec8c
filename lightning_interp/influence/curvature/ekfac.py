"""Kronecker-factored curvature, with and without corrected eigenvalues."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.checks import check_counts
from lightning_interp.data.samples import Samples
from lightning_interp.influence.curvature.curvature import (
    Fitted,
    Gradients,
    Scorer,
    Shift,
    share_of_mean_eigenvalue,
    spread_out,
    sum_of,
)
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.gradients.blocks import ParameterBlock
from lightning_interp.influence.gradients.factored import FactoredGradients, Lookup, elements_in_memory
from lightning_interp.influence.gradients.reader import Reader

WIDEST_FACTOR = 4096  # 128 MB in float64; as time grows with the cube, a wider side keeps its own coordinates
MOST_CACHED = 2**22  # elements, 16 MB of float32: if the columns take more, each pass computes them anew

ColumnPass = Callable[[str], Iterator[dict[str, FactoredGradients]]]


@dataclass(frozen=True)
class EKFAC:
    """Generalised Gauss–Newton matrix, one block per layer, diagonal in a Kronecker-factored eigenbasis.

    H_layer ≈ (U_B ⊗ U_A) Λ (U_B ⊗ U_A)ᵀ: U_A and U_B are the eigenvectors of the summed GᵀG and GGᵀ of the matrix's
    columns G, Λ the mean squared gradient along each of their products. What it leaves out: curvature between layers,
    and within one off its basis. Parameters that are no matrix have a full block, or its diagonal where they are over
    4,096.

    Reference: George et al., Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis, 2018;
    Grosse et al., Studying Large Language Model Generalization with Influence Functions, 2023.

    Args:
        columns: how many columns of the matrix it is estimated from: an unbiased sample, which contains the large ones
            (see `PrioritySample`); every column of every sample when None.
        samples: training samples, evenly spread, that it is estimated from; all when None.
        seed: of the sample.
    """

    columns: int | None = 2048
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(type(self).__name__, columns=self.columns, samples=self.samples)

    def check(self, parameters: int) -> None:
        """Accept any number of parameters: memory grows with the layers' widths, not with their product squared."""

    def default_damping(self, fitted: Fitted) -> Damping:
        """Return 0.1 × the mean eigenvalue: what Kronecker factors leave out takes more damping than training had."""
        return share_of_mean_eigenvalue(fitted)

    def decomposition_cost(self, blocks: Iterable[ParameterBlock]) -> float:
        """Return the sum of the cubes of all sides that get eigenvectors."""
        return eigenvectors_cost(blocks)

    def fit(self, reader: Reader, samples: Samples) -> FittedEKFAC:
        """Estimate the blocks in two passes over the columns: factors first, then the eigenvalues in their basis."""
        subset = spread_out(samples, self.samples)
        column_gradients, n, notes = column_passes(reader, subset, self.columns, self.seed)
        bases = _bases(column_gradients("curvature, factors"))
        eigenvalues: dict[str, Tensor] = {}
        for rows in column_gradients("curvature, eigenvalues"):
            for block, row in rows.items():
                squares = _squares_in_basis(row, bases[block])
                eigenvalues[block] = eigenvalues[block] + squares if block in eigenvalues else squares
        return FittedEKFAC(bases, {block: sums / n for block, sums in eigenvalues.items()}, n, notes)


class Basis(NamedTuple):
    """Eigenvectors of a block's two sides; None where a side keeps its own coordinates.

    Args:
        outputs: `(groups, o, o)`.
        inputs: `(groups, i, i)`.
    """

    outputs: Tensor | None
    inputs: Tensor | None

    def rotate(self, gradients: Tensor) -> Tensor:
        """Return U_Bᵀ G U_A."""
        if self.outputs is not None:
            gradients = self.outputs.mT @ gradients
        return gradients if self.inputs is None else gradients @ self.inputs

    def back(self, rotated: Tensor) -> Tensor:
        """Return U_B G U_Aᵀ."""
        if self.outputs is not None:
            rotated = self.outputs @ rotated
        return rotated if self.inputs is None else rotated @ self.inputs.mT

    def diagonal(self, shift: float | Tensor) -> float | Tensor:
        """Return the diagonal, in this basis, of a matrix that is diagonal in the parameters: Σ U_B² Λ U_A²."""
        if not isinstance(shift, Tensor):
            return shift
        return Basis(*(None if side is None else side.square() for side in self)).rotate(shift)


@dataclass(frozen=True, eq=False)
class FittedEKFAC:
    """Curvature estimated from data, ready to be inverted.

    Args:
        bases: block → its basis.
        eigenvalues: block → `(groups, o, i)`.
        n: number of samples used.
        notes: how many columns it was estimated from.
    """

    bases: dict[str, Basis]
    eigenvalues: dict[str, Tensor]
    n: int
    notes: tuple[str, ...] = ()

    @property
    def mean_eigenvalue(self) -> float:
        """Mean over all eigenvalues of all blocks."""
        total = sum(float(values.cpu().double().sum()) for values in self.eigenvalues.values())
        return total / sum(values.numel() for values in self.eigenvalues.values())

    def inverse(self, shift: Shift) -> EKFACInverse:
        """Return (H + Λ)⁻¹, a Λ that is no multiple of the identity by its diagonal in the basis."""
        damped = {b: values + self.bases[b].diagonal(shift[b]) for b, values in self.eigenvalues.items()}
        return EKFACInverse(self.bases, damped)


@dataclass(frozen=True, eq=False)
class EKFACInverse:
    """(H + Λ)⁻¹, diagonal in each block's basis.

    Args:
        bases: block → its basis.
        eigenvalues: block → those of H + Λ, `(groups, o, i)`.
    """

    bases: dict[str, Basis]
    eigenvalues: dict[str, Tensor]

    def against(self, queries: Gradients) -> Scorer:
        """Return a function: gradients of m samples → ∇ℓ_qᵀ (H + Λ)⁻¹ ∇ℓ_i, `(q, m)`."""
        solved = self.solve(queries)
        return lambda rows: sum_of(rows[block].dot(solved[block]) for block in solved)

    def solve(self, rows: Gradients) -> dict[str, Tensor]:
        """Return (H + Λ)⁻¹ ∇ℓ of each sample: block → `(q, groups, o, i)`."""
        return self.solved({block: row.gradients() for block, row in rows.items()})

    def solved(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return (H + Λ)⁻¹ times vectors by blocks, `(q, groups, o, i)`."""
        return {
            block: self.bases[block].back(self.bases[block].rotate(vector) / self.eigenvalues[block])
            for block, vector in vectors.items()
        }

    def squares(self, rows: Gradients) -> Tensor:
        """Return ∇ℓ_iᵀ (H + Λ)⁻¹ ∇ℓ_i of each sample, `(n,)`."""
        return sum_of(
            _weighted_squares(row, self.bases[block], 1 / self.eigenvalues[block]) for block, row in rows.items()
        )


def column_passes(
    reader: Reader, samples: Samples, count: int | None, seed: int
) -> tuple[ColumnPass, int, tuple[str, ...]]:
    """Return a function that starts a pass over the curvature's columns, their number of samples, and notes."""
    if count is None:
        return lambda what: reader.gradients_of_all_columns(samples, seed, what), len(samples), ()
    columns = reader.sample_columns(samples, count, seed)
    cached: list[dict[str, FactoredGradients]] = []

    def sampled_columns(what: str) -> Iterator[dict[str, FactoredGradients]]:
        if cached:
            yield from cached
            return
        to_cache: list[dict[str, FactoredGradients]] = []
        stored_elements = 0
        for rows in reader.gradients_of_columns(samples, columns, what):
            stored_elements += elements_in_memory(rows)
            to_cache = [*to_cache, rows] if stored_elements <= MOST_CACHED else []
            yield rows
        # Only here: a pass that was not read to its end must not be cached.
        cached.extend(to_cache)

    return sampled_columns, columns.n, columns.notes


def eigenvectors_cost(blocks: Iterable[ParameterBlock]) -> float:
    """Return how many multiplications, up to a factor, the eigenvectors of these blocks' sides take."""
    cost = 0.0
    for block in blocks:
        groups, o, i = block.shape
        sides = (o,) if block.layout == "table" else (o, i)  # a table's other side keeps its own coordinates
        cost += groups * sum(side**3 for side in sides if 1 < side <= WIDEST_FACTOR)
    return cost


def _bases(column_gradients: Iterator[dict[str, FactoredGradients]]) -> dict[str, Basis]:
    moments_of_blocks: dict[str, list[Tensor | None]] = {}
    for rows in column_gradients:
        for block, row in rows.items():
            moments = _side_moments(row)
            old_moments = moments_of_blocks.setdefault(block, [None, None])
            pairs = zip(old_moments, moments, strict=True)
            moments_of_blocks[block] = [new if old is None or new is None else old + new for old, new in pairs]
    return {block: Basis(*map(_factor_eigenvectors, pair)) for block, pair in moments_of_blocks.items()}


def _side_moments(rows: FactoredGradients) -> tuple[Tensor | None, Tensor | None]:
    """Return Σ GGᵀ and Σ GᵀG over samples; None where that side is too wide or has one dimension."""
    _, o, i = rows.shape
    decomposed_inputs = 1 < i <= WIDEST_FACTOR
    decomposed_outputs = 1 < o <= WIDEST_FACTOR
    if rows.positions == 1 and isinstance(rows.inputs, Tensor):
        a, g = rows.inputs[:, :, 0].transpose(0, 1), rows.outputs[:, :, 0].transpose(0, 1)
        # With G = g aᵀ, GGᵀ = |a|² g gᵀ and GᵀG = |g|² a aᵀ.
        outputs = g.mT @ (g * a.square().sum(2, keepdim=True)) if decomposed_outputs else None
        return outputs, a.mT @ (a * g.square().sum(2, keepdim=True)) if decomposed_inputs else None
    if isinstance(rows.inputs, Lookup):
        # A sample's rows of a table are distinct, so that GGᵀ is the sum of their g gᵀ.
        output_rows = rows.outputs.flatten(0, 2)
        return (output_rows.mT @ output_rows)[None] if decomposed_outputs else None, None
    outputs, inputs = None, None
    for _, chunk in rows.chunks():
        gradients = chunk.gradients()
        if decomposed_outputs:
            moment = torch.einsum("ngoi,ngpi->gop", gradients, gradients)
            outputs = moment if outputs is None else outputs + moment
        if decomposed_inputs:
            moment = torch.einsum("ngoi,ngoj->gij", gradients, gradients)
            inputs = moment if inputs is None else inputs + moment
    return outputs, inputs


def _factor_eigenvectors(factor: Tensor | None) -> Tensor | None:
    # In float64, against the rounding of small eigenvalues, and so on the CPU: not every device has that type.
    if factor is None:
        return None
    return torch.linalg.eigh(factor.cpu().double())[1].to(factor)


def _squares_in_basis(rows: FactoredGradients, basis: Basis) -> Tensor:
    """Return Σ_n (U_Bᵀ G_n U_A)² over samples, G_n a sample's gradient."""
    if isinstance(rows.inputs, Lookup):
        return rows.inputs.sum_by_row(_rotated_table(rows, basis).square())
    if (factors := _squared_factors(rows, basis)) is not None:
        return torch.einsum("ngo,ngi->goi", *factors)
    return sum_of(basis.rotate(chunk.gradients()).square().sum(0) for _, chunk in rows.chunks())


def _rotated_table(rows: FactoredGradients, basis: Basis) -> Float[Tensor, "n t o"]:
    """Return U_Bᵀ g of each row that a sample took; the table's own side keeps its coordinates."""
    outputs = rows.outputs[:, 0]
    return outputs if basis.outputs is None else outputs @ basis.outputs[0]


def _squared_factors(rows: FactoredGradients, basis: Basis) -> tuple[Tensor, Tensor] | None:
    """Return the squares of rotated outputs `(n, groups, o)` and inputs `(n, groups, i)`; None at several positions."""
    if rows.positions != 1 or isinstance(rows.inputs, Lookup):
        return None
    a, g = rows.inputs[:, :, 0], rows.outputs[:, :, 0]
    g = g if basis.outputs is None else torch.einsum("ngo,gop->ngp", g, basis.outputs)
    a = a if basis.inputs is None else torch.einsum("ngi,gij->ngj", a, basis.inputs)
    return g.square(), a.square()


def _weighted_squares(rows: FactoredGradients, basis: Basis, weights: Tensor) -> Tensor:
    """Return Σ weights ⊙ (U_Bᵀ G U_A)² of each sample, in the cheaper order."""
    if isinstance(rows.inputs, Lookup):
        return torch.einsum("ntd,dnt->n", _rotated_table(rows, basis).square(), weights[0][:, rows.inputs.index])
    if (factors := _squared_factors(rows, basis)) is not None:
        return torch.einsum("ngo,ngi,goi->n", *factors, weights)
    sums = [(basis.rotate(chunk.gradients()).square() * weights).sum((1, 2, 3)) for _, chunk in rows.chunks()]
    return torch.cat(sums)
