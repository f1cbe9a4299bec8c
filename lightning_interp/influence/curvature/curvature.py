"""The interface of curvatures: estimate H, then apply (H + Λ)⁻¹ between gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from operator import add
from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_interp.data.samples import Samples
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.gradients.blocks import ParameterBlock
from lightning_interp.influence.gradients.factored import FactoredGradients
from lightning_interp.influence.gradients.reader import Reader

Gradients = Mapping[str, FactoredGradients]
Shift = Mapping[str, float | Tensor]
Scorer = Callable[[Gradients], Tensor]
DAMPING_SHARE = 0.1  # of the mean eigenvalue, as in Grosse et al., 2023: directions far below the mean are damped


@runtime_checkable
class Inverse(Protocol):
    """A damped curvature's inverse, as a product between gradients.

    It may have `halves`, a pair of inverses from half of its own randomness each: scores are compared between them. The
    function that `against` returns may have `notes`, what to report of these queries.
    """

    def against(self, queries: Gradients) -> Scorer:
        """Return a function: gradients of m samples → ∇ℓ_qᵀ (H + Λ)⁻¹ ∇ℓ_i, `(q, m)`."""

    def squares(self, rows: Gradients) -> Tensor:
        """Return ∇ℓ_iᵀ (H + Λ)⁻¹ ∇ℓ_i of each sample, `(n,)`."""


@runtime_checkable
class Solver(Protocol):
    """An inverse that also gives its products with gradients as vectors."""

    def solve(self, rows: Gradients) -> dict[str, Tensor]:
        """Return (H + Λ)⁻¹ ∇ℓ of each sample: block → `(q, groups, o, i)`."""


@runtime_checkable
class Fitted(Protocol):
    """A curvature estimated from data."""

    @property
    def n(self) -> int:
        """Number of samples used."""

    @property
    def mean_eigenvalue(self) -> float:
        """Mean over all eigenvalues."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report must mention about it."""

    def inverse(self, shift: Shift) -> Inverse:
        """Return (H + Λ)⁻¹, Λ given per block: a number, or `(groups, o, i)`."""


@runtime_checkable
class Curvature(Protocol):
    """How the curvature is estimated; `EKFAC`, `KFAC`, `GaussNewton` and `IdentityCurvature` are such.

    `check` and `fit` are all that one must have. What else it may have, each with the default for one that has not:

    - `needs_outputs = True`: whether it is taken from the network's outputs and the loss as a function of them. Where
      False, gradients of losses are enough, so that it also works for a `Task.from_training_step` whose outputs do not
      give the step's loss.
    - `in_loss_unit = True`: whether scores are changes of the loss. Where False, they have no unit, and damping has no
      meaning.
    - `solves_per_query = False`: whether all of its cost comes with the queries. Where True, the callback scores all
      samples regardless of its budget, and leaves out self-influence, which would be a query for each of them.
    - `default_damping(fitted) -> Damping`: what suits it where the user gave no damping. It then also precedes the
      damping that follows from a recorded `Trajectory`. By default the trajectory's is used, or else 0.1 × the mean
      eigenvalue.
    - `decomposition_cost(blocks) -> float`: how many multiplications `fit` spends beside its passes over samples, for
      these `ParameterBlock`s. By default 0, for a negligible number.
    - `samples: int | None`, a dataclass field: how many training samples it is estimated from; a callback that is short
      of time lowers it. Without it, the curvature is estimated from all.
    - `columns: int | None`, a dataclass field: how many columns of the matrix it is estimated from. Without it, or with
      None, all of the cost of `fit` is taken to grow with the samples.
    """

    def check(self, parameters: int) -> None:
        """Raise a ValueError if it cannot be estimated for so many parameters."""

    def fit(self, reader: Reader, samples: Samples) -> Fitted:
        """Estimate it from the training samples."""


def needs_outputs(curvature: Curvature) -> bool:
    """Say whether a curvature is taken from outputs and their loss, not from gradients of losses alone."""
    return bool(getattr(curvature, "needs_outputs", True))


def in_loss_unit(curvature: Curvature) -> bool:
    """Say whether scores by a curvature are changes of the loss."""
    return bool(getattr(curvature, "in_loss_unit", True))


def solves_per_query(curvature: Curvature) -> bool:
    """Say whether all of a curvature's cost comes with the queries."""
    return bool(getattr(curvature, "solves_per_query", False))


def decomposition_cost(curvature: Curvature, blocks: Iterable[ParameterBlock]) -> float:
    """Return how many multiplications a curvature's `fit` spends beside its passes over samples."""
    cost = getattr(curvature, "decomposition_cost", None)
    return 0.0 if cost is None else float(cost(blocks))


def damping_for(curvature: Curvature, fitted: Fitted, users: Damping | None, recorded: Damping | None) -> Damping:
    """Return the user's damping, else the curvature's own, else the recorded, else 0.1 × the mean eigenvalue.

    Raises:
        ValueError: there is none of these, and the curvature is zero.
        TypeError: the curvature's own is no `Damping`.
    """
    if users is not None:
        return users
    default_damping: Callable[[Fitted], Damping] | None = getattr(curvature, "default_damping", None)
    if default_damping is not None:
        own = default_damping(fitted)
        if not isinstance(own, Damping):
            raise TypeError(f"{type(curvature).__name__}.default_damping: expected a Damping, got {own!r}")
        return own
    return recorded or share_of_mean_eigenvalue(fitted)


def share_of_mean_eigenvalue(fitted: Fitted) -> Damping:
    """Return 0.1 × the mean eigenvalue as the damping.

    Raises:
        ValueError: the curvature is zero.
    """
    damping = DAMPING_SHARE * fitted.mean_eigenvalue
    if not damping > 0:
        raise ValueError("damping: the curvature to take it from is zero (is the softmax saturated?); pass damping=")
    return Damping(damping, f"{DAMPING_SHARE} × the mean eigenvalue of the curvature")


def spread_out(samples: Samples, count: int | None) -> Samples:
    """Return `count` samples at even distances; all when None."""
    return samples if count is None else samples.spread(count)


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors."""
    return reduce(add, tensors)
