"""Linear models fitted around one sample: of the network's scores, in which parts are on."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FLOAT64_NOISE = 1e-12  # what float64 leaves of a number that is 0 in exact arithmetic, times 100 or so


class LocalModel(NamedTuple):
    """Linear models of several outputs in the same parts.

    Args:
        coefficients: `(parts, outputs)`, in the score's unit.
        r2: share of each output's weighted variance that its model explains, `(outputs,)`; NaN where there is none.
    """

    coefficients: Float[Tensor, "parts outputs"]
    r2: Float[Tensor, " outputs"]


def weighted_ridge(
    masks: Bool[Tensor, "draws parts"],
    scores: Float[Tensor, "draws outputs"],
    weights: Float[Tensor, " draws"],
    penalty: float = 1.0,
) -> LocalModel:
    """Return the ridge regression of all outputs at once, in float64.

    β, b = argmin Σ_i w_i (y_i − b − z_iᵀβ)² + penalty · ‖β‖²; the intercept b is not penalised.

    Raises:
        ValueError: the equations are singular: no penalty, and fewer different draws than parts.
    """
    z, y = _centred(masks.double(), weights), _centred(scores.double(), weights)
    gram = (z.T * weights) @ z + penalty * torch.eye(z.shape[1], dtype=torch.float64)
    coefficients = solved(gram, (z.T * weights) @ y)
    return LocalModel(coefficients, r_squared(scores.double(), y - z @ coefficients, weights))


def k_lasso(
    masks: Bool[Tensor, "draws parts"],
    scores: Float[Tensor, "draws outputs"],
    weights: Float[Tensor, " draws"],
    max_features: int,
) -> LocalModel:
    """Return weighted least squares in at most `max_features` parts of each output, chosen by the lasso's path.

    Reference: Ribeiro et al., "Why should I trust you?", 2016, algorithm 1.
    """
    coefficients = torch.zeros(masks.shape[1], scores.shape[1], dtype=torch.float64)
    r2 = torch.full((scores.shape[1],), torch.nan, dtype=torch.float64)
    for output, score in enumerate(scores.T):
        if not bool(score.isfinite().all()):
            coefficients[:, output] = torch.nan
            continue
        selected = on_the_path(masks, score, weights, max_features)
        model = weighted_ridge(masks[:, selected], score[:, None], weights, 0.0)
        coefficients[selected, output] = model.coefficients[:, 0]
        r2[output] = model.r2[0]
    return LocalModel(coefficients, r2)


def on_the_path(
    masks: Bool[Tensor, "draws parts"],
    score: Float[Tensor, " draws"],
    weights: Float[Tensor, " draws"],
    max_features: int,
) -> Tensor:
    """Return the parts at the last knot of the weighted lasso's path with at most `max_features` coefficients.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import lars_path
    except ImportError as error:
        raise ImportError(
            "LIME(features=...): expected scikit-learn to be installed (pip install scikit-learn)"
        ) from error
    root = weights.sqrt()[:, None]
    z, y = root * _centred(masks.double(), weights), root * _centred(score.double()[:, None], weights)
    with warnings.catch_warnings():
        # A path that reaches an exact fit stops there and warns; nothing beyond is needed.
        warnings.simplefilter("ignore")
        _, _, path = lars_path(z.numpy(), y[:, 0].numpy(), method="lasso")
    knots = torch.from_numpy(path) != 0
    fitting = knots[:, knots.sum(0) <= max_features]
    return fitting[:, -1].nonzero()[:, 0]


def with_fixed_sum(
    masks: Bool[Tensor, "draws parts"],
    scores: Float[Tensor, "draws outputs"],
    weights: Float[Tensor, " draws"],
    none: Float[Tensor, " outputs"],
    total: Float[Tensor, " outputs"],
) -> LocalModel:
    """Return weighted least squares whose intercept and sum of coefficients are given.

    φ = argmin Σ_i w_i (y_i − none − z_iᵀφ)² under Σ φ = total, by eliminating the last part.

    Args:
        masks: which parts are on.
        scores: the network's.
        weights: of the draws.
        none: the intercept: the network's score with no part on.
        total: the sum of coefficients: what all parts together add to the intercept.

    Raises:
        ValueError: the equations are singular: fewer different draws than parts.
    """
    if not masks.shape[1]:
        return LocalModel(none.new_zeros(0, len(none)), torch.full_like(none, torch.nan))
    z, y = masks.double(), scores.double() - none
    last = z[:, -1:]
    free, residual = z[:, :-1] - last, y - last * total
    firsts = solved((free.T * weights) @ free, (free.T * weights) @ residual)
    coefficients = torch.cat([firsts, (total - firsts.sum(0))[None]])
    return LocalModel(coefficients, r_squared(scores.double(), y - z @ coefficients, weights))


def r_squared(
    y: Float[Tensor, "draws outputs"], residuals: Float[Tensor, "draws outputs"], weights: Float[Tensor, " draws"]
) -> Float[Tensor, " outputs"]:
    """Return 1 − Σ w (y − ŷ)² / Σ w (y − ȳ)², ȳ the weighted mean; NaN where y does not vary beyond rounding."""
    varied = weights @ _centred(y, weights).square()
    r2 = 1 - (weights @ residuals.square()) / varied
    return r2.where(varied > FLOAT64_NOISE**2 * (weights @ y.square()), torch.nan)


def solved(gram: Float[Tensor, "m m"], right: Float[Tensor, "m outputs"]) -> Float[Tensor, "m outputs"]:
    """Return the solution of normal equations by Cholesky; NaN where they hold NaN.

    Raises:
        ValueError: they are singular.
    """
    if not bool(gram.isfinite().all()):
        return torch.full_like(right, torch.nan)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed) or bool((factor.diagonal().square() <= FLOAT64_NOISE * gram.diagonal()).any()):
        raise ValueError(
            f"samples: expected enough different draws to tell {len(gram)} parts apart, got too few; take more samples"
            " or fewer parts"
        )
    return torch.cholesky_solve(right, factor)


def _centred(values: Tensor, weights: Tensor) -> Tensor:
    return values - (weights @ values) / weights.sum()
