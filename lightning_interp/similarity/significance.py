"""What a similarity would be by chance, and how much it varies with the choice of samples: for any measure."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.checks import tag
from lightning_interp.similarity.matrix import AnyMeasure, as_number, similarity
from lightning_interp.similarity.representation import Representation, same_samples

FEWEST_FOR_JACKKNIFE = 8  # the error of an error from n values is about 1/√(2(n − 1)) of it: a quarter at 8


def chance(measure: AnyMeasure, x: Representation, y: Representation, draws: int = 3) -> float:
    """Return what a measure would give by chance: its mean over permutations of one layer's samples.

    By the measure's own `chance(x, y)` where it has one (exact for CKA and for R²_CCA, plain or after SVCCA's
    reduction); else the mean of a few random permutations. NaN where the layers' rows differ.
    """
    exact = chance_in_closed_form(measure, x, y)
    return float(permutation_null(measure, x, y, draws).mean()) if exact is None else exact


def chance_in_closed_form(measure: AnyMeasure, x: Representation, y: Representation) -> float | None:
    """Return the value by chance that a measure's own `chance(x, y)` gives; None where there is no formula."""
    if x.n != y.n:
        return float("nan")
    method = getattr(measure, "chance", None)
    value = None if method is None else method(x, y)
    return None if value is None else float(as_number(value, f"{tag(measure)}.chance"))


def standard_error(measure: AnyMeasure, x: Representation, y: Representation) -> float:
    """Return how much a value varies with the choice of samples, by the measure's own `standard_error(x, y)`.

    NaN for a measure without one, and where the layers' rows differ.
    """
    method = getattr(measure, "standard_error", None)
    if method is None or x.n != y.n:
        return float("nan")
    return float(as_number(method(x, y), f"{tag(measure)}.standard_error"))


def permutation_null(
    measure: AnyMeasure, x: Representation, y: Representation, draws: int = 20, seed: int = 0
) -> Float[Tensor, " draws"]:
    """Return a measure's values for random permutations of y's samples, by a generator of its own.

    Args:
        measure: any.
        x: a prepared layer.
        y: another.
        draws: how many permutations.
        seed: of the permutations.
    """
    same_samples(x, y)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(y.n, generator=generator) for _ in range(draws)]
    return torch.stack([similarity(measure, x, y.shuffled(order)) for order in orders])


def jackknife_standard_error(values: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return √((n − 1)/n Σ_i (θ_i − θ̄)²), θ_i a statistic of the n − 1 samples without sample i.

    Reference: Efron & Stein, The Jackknife Estimate of Variance, 1981.
    """
    n = len(values)
    return ((n - 1) / n * (values - values.mean()).square().sum()).sqrt()
