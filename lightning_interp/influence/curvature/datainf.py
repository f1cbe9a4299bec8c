"""DataInf: the mean of the samples' damped inverses in place of the damped inverse of their mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.checks import check_counts
from lightning_interp.data.samples import Samples
from lightning_interp.influence.curvature.curvature import DAMPING_SHARE, Gradients, Scorer, Shift, spread_out, sum_of
from lightning_interp.influence.curvature.gauss_newton import gather, inverse_root, whiten
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.gradients.blocks import ParameterBlock
from lightning_interp.influence.gradients.factored import FactoredGradients, dot_products
from lightning_interp.influence.gradients.reader import Reader


@dataclass(frozen=True)
class DataInf:
    """(H + Λ)⁻¹ ≈ (1/n) Σ_i (g_i g_iᵀ + Λ)⁻¹, one block per layer, g_i = ∇ℓ_i: nothing is decomposed.

    H is the second moment of the samples' gradients, near the generalised Gauss–Newton matrix where the predicted
    probabilities fit the data. Each sample's inverse has a closed form (Sherman and Morrison); their mean is not the
    inverse of the mean, the less so the more parameters a layer has. Λ may differ by parameter. The samples' gradients
    are held in memory, as factors where these are smaller.

    Reference: Kwon et al., DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and Diffusion Models,
    2023.

    Args:
        samples: training samples, evenly spread, that it is estimated from; all when None.
    """

    samples: int | None = None

    needs_outputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts("DataInf", samples=self.samples)

    def check(self, parameters: int) -> None:
        """Accept any number of parameters: memory grows with the samples."""

    def default_damping(self, fitted: FittedDataInf) -> Damping:
        """Return for each layer 0.1 × the mean over samples and elements of its squared gradient, as in the paper.

        Raises:
            ValueError: all gradients of a layer are zero.
        """
        values: dict[str, float | Tensor] = {}
        for name, block in fitted.blocks.items():
            damping = DAMPING_SHARE * fitted.squared_norms[name] / (fitted.n * block.size)
            if not damping > 0:
                raise ValueError(f"damping: expected gradients of {name} to take it from, got zeros; pass damping=")
            values |= dict.fromkeys(block.parameters, damping)
        return Damping(values, f"{DAMPING_SHARE} × each layer's mean squared gradient")

    def fit(self, reader: Reader, samples: Samples) -> FittedDataInf:
        """Gather the gradients of the samples' losses, in one pass."""
        subset = spread_out(samples, self.samples)
        batches = reader.per_sample_gradients(subset, "curvature, gradients")
        return FittedDataInf(gather(batch.loss_gradients() for batch in batches), reader.coverage.blocks, len(subset))


@dataclass(frozen=True, eq=False)
class FittedDataInf:
    """The samples' gradients.

    Args:
        gradients: block → those of all samples used.
        blocks: name → its parameters.
        n: number of samples used.
        notes: what to report of it.
    """

    gradients: Gradients
    blocks: Mapping[str, ParameterBlock]
    n: int
    notes: tuple[str, ...] = ()

    @property
    def squared_norms(self) -> dict[str, float]:
        """Block → Σ |g_i|² over samples."""
        return {name: float(block.squared_norms().double().sum()) for name, block in self.gradients.items()}

    @property
    def mean_eigenvalue(self) -> float:
        """Mean over all eigenvalues of (1/n) Σ g gᵀ."""
        return sum(self.squared_norms.values()) / (self.n * sum(block.size for block in self.blocks.values()))

    def inverse(self, shift: Shift) -> DataInfInverse:
        """Return (1/n) Σ (g gᵀ + Λ)⁻¹."""
        gradients = whiten(self.gradients, shift)
        shares = {name: 1 / (self.n * (1 + block.squared_norms())) for name, block in gradients.items()}
        return DataInfInverse(gradients, shift, shares)


@dataclass(frozen=True, eq=False)
class DataInfInverse:
    """(1/n) Σ (g gᵀ + Λ)⁻¹ = Λ^−½ (I − Σ share · d dᵀ) Λ^−½ with d = Λ^−½ g, per block.

    Args:
        gradients: block → d of all samples used.
        shift: Λ.
        shares: block → 1 / (n (1 + |d|²)) of each sample, `(n,)`.
    """

    gradients: Gradients
    shift: Shift
    shares: Mapping[str, Float[Tensor, " n"]]

    def against(self, queries: Gradients) -> Scorer:
        """Return a function: gradients of m samples → ∇ℓ_qᵀ (H + Λ)⁻¹ ∇ℓ_i, `(q, m)`."""
        solved = self.solve(queries)
        return lambda rows: sum_of(rows[block].dot(vectors) for block, vectors in solved.items())

    def solve(self, rows: Gradients) -> dict[str, Tensor]:
        """Return (H + Λ)⁻¹ ∇ℓ of each sample: block → `(q, groups, o, i)`."""
        return {block: self._solve_block(block, row) for block, row in rows.items()}

    def squares(self, rows: Gradients) -> Float[Tensor, " n"]:
        """Return ∇ℓ_iᵀ (H + Λ)⁻¹ ∇ℓ_i of each sample, `(n,)`."""
        return sum_of(
            row.squared_norms() - self.shares[block] @ dot_products(self.gradients[block], row).square()
            for block, row in whiten(rows, self.shift).items()
        )

    def _solve_block(self, block: str, row: FactoredGradients) -> Float[Tensor, "q groups o i"]:
        """Return I − Σ share · d dᵀ between the two Λ^−½, times each sample's gradient."""
        white, own = whiten({block: row}, self.shift)[block], self.gradients[block]
        weights = dot_products(white, own) * self.shares[block]
        removed = torch.stack([own.scale(of_query).sum() for of_query in weights]).flatten(1)
        remaining = white.gradients().flatten(1) - removed
        return (remaining * inverse_root(self.shift[block], remaining)).reshape(-1, *row.shape)
