"""Influence in logistic regression, in closed form and with its factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

NEWTON_STEPS = 100  # far more than Newton's method takes where it converges


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors whose product is the influence of a training sample on a query. Positive is helpful.

    scores[q, i] = (1/n) query_residual[q] · training_loss[i] · closeness[q, i]. With two classes the closeness is the
    product of `labels` and `features`. With more it is not: each pair of classes has a curvature of its own, which
    couples the two; `labels` and `features` are then what they would be if all pairs had the mean one. With `leverage`
    the closeness holds the correction, too.

    Args:
        query_residual: probability that the model gives to the wrong classes of each query, `(q,)`, 0 to 1.
        training_loss: the same of each training sample, `(n,)`: σ(−y θᵀx) with two classes; 0 where it is fitted.
        labels: closeness of labels, `(q, n)`: y_q y with two classes; else 1 where both gradients raise the same
            class at the cost of the same other one, −1 where each raises the class that the other lowers.
        features: closeness of features, x_qᵀ H⁻¹ x, `(q, n)`.
        closeness: of features and labels together, `(q, n)`.
    """

    query_residual: Float[Tensor, " q"]
    training_loss: Float[Tensor, " n"]
    labels: Float[Tensor, "q n"]
    features: Float[Tensor, "q n"]
    closeness: Float[Tensor, "q n"]

    @property
    def scores(self) -> Float[Tensor, "q n"]:
        """Predicted rise of each query's loss when a training sample is left out, in the unit of the loss."""
        return self.query_residual[:, None] * self.training_loss * self.closeness / len(self.training_loss)


def binary_factors(
    weights: Float[Tensor, " d"],
    train: tuple[Float[Tensor, "n d"], Int[Tensor, " n"]],
    query: tuple[Float[Tensor, "q d"], Int[Tensor, " q"]],
    decay: float,
    leverage: bool = False,
) -> Factors:
    """Return the factors of influence in a logistic regression with labels −1 and 1, in float64.

    scores[q, i] = (1/n) σ(−y_q θᵀx_q) · σ(−y_i θᵀx_i) · y_q y_i · x_qᵀ H⁻¹ x_i,
    H = (1/n) Σ σ(θᵀx) σ(−θᵀx) x xᵀ + λI.

    Reference: Koh & Liang, Understanding Black-box Predictions via Influence Functions, 2017, section 2.2 (−n times
    this).

    Args:
        weights: θ at the optimum of (1/n) Σ log(1 + exp(−y θᵀx)) + (λ/2) |θ|².
        train: features, with a column of ones where there is a bias, and labels.
        query: the same of the queries.
        decay: λ.
        leverage: correct for what removing a sample takes from the curvature, by 1 / (1 − h): see `leverage_corrected`.

    Raises:
        ValueError: labels are not −1 and 1, or λ is not positive.
        FloatingPointError: weights or features are not finite.
    """
    for name, labels in (("train", train[1]), ("query", query[1])):
        if not bool((labels.abs() == 1).all()):
            raise ValueError(f"{name}: expected labels −1 and 1, got {labels.unique().tolist()[:5]}")
    (x, y), (query_x, query_y) = ((features.double(), labels.double()) for features, labels in (train, query))
    probabilities = (x @ weights.double()).sigmoid()[:, None]
    inverse = inverse_curvature(x, probabilities, decay)
    features, labels = query_x @ inverse @ x.T, query_y[:, None] * y
    correction = torch.ones_like(y)
    if leverage:
        correction = leverage_corrected(x, probabilities, torch.ones_like(probabilities), inverse)[:, 0]
    query_residual, training_loss = (
        (-side_y * (side_x @ weights.double())).sigmoid() for side_x, side_y in ((query_x, query_y), (x, y))
    )
    return Factors(query_residual, training_loss, labels, features, labels * features * correction)


def multinomial_factors(
    weights: Float[Tensor, "c d"],
    train: tuple[Float[Tensor, "n d"], Int[Tensor, " n"]],
    query: tuple[Float[Tensor, "q d"], Int[Tensor, " q"]],
    decay: float,
    leverage: bool = False,
) -> Factors:
    """Return the factors of influence in a multinomial logistic regression, in float64.

    The gradient is t (d ⊗ x): t the probability of the wrong classes, d = (their probabilities)/t − e_y. With it
    scores[q, i] = (1/n) t_q t_i (d_q ⊗ x_q)ᵀ H⁻¹ (d_i ⊗ x_i), H = (1/n) Σ (diag p − p pᵀ) ⊗ x xᵀ + λI. Labels are
    d_qᵀd_i / 2; features x_qᵀ M x_i, M = 2 Σ_c (P H⁻¹ P)_cc / (C − 1) over the blocks of classes, P the projection off
    the vector of ones. Two classes with λ are the binary regression with λ/2, factor by factor.

    Args:
        weights: at the optimum of the mean cross entropy + (λ/2) ‖θ‖².
        train: features, with a column of ones where there is a bias, and classes.
        query: the same of the queries.
        decay: λ.
        leverage: correct for what removing a sample takes from the curvature: see `leverage_corrected`.

    Raises:
        ValueError: there are fewer than two classes, targets are none of them, or λ is not positive.
        FloatingPointError: weights or features are not finite.
    """
    classes, width = weights.shape
    _check_classes(classes, train=train[1], query=query[1])
    weights, x, query_x = (tensor.double() for tensor in (weights, train[0], query[0]))
    logits = x @ weights.T
    training_loss, direction = _residuals(logits, train[1])
    query_residual, query_direction = _residuals(query_x @ weights.T, query[1])
    probabilities = logits.softmax(1)
    inverse = inverse_curvature(x, probabilities, decay)
    corrected = leverage_corrected(x, probabilities, direction, inverse) if leverage else direction
    closeness = _outer(query_direction, query_x) @ inverse @ _outer(corrected, x).T
    blocks = inverse.reshape(classes, width, classes, width)
    mean = 2 * (torch.einsum("cdce->de", blocks) - blocks.sum((0, 2)) / classes) / (classes - 1)
    labels, features = query_direction @ direction.T / 2, query_x @ mean @ x.T
    return Factors(query_residual, training_loss, labels, features, closeness)


def inverse_curvature(
    features: Float[Tensor, "n d"], chances: Float[Tensor, "n c"], decay: float
) -> Float[Tensor, "cd cd"]:
    """Return (H + λI)⁻¹ of logistic regression, classes outside and features inside.

    H = (1/n) Σ (diag p − p pᵀ) ⊗ x xᵀ. Memory: 8 bytes × (c d)².

    Args:
        features: with a column of ones where there is a bias.
        chances: softmax of each sample, or the one sigmoid `(n, 1)` of a binary regression.
        decay: λ, weight decay and damping.

    Raises:
        ValueError: λ is not positive.
        FloatingPointError: features or chances are not finite.
    """
    hessian = _curvature(features, chances, decay)
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def leverage_corrected(
    features: Float[Tensor, "n d"],
    chances: Float[Tensor, "n c"],
    residuals: Float[Tensor, "n c"],
    inverse: Float[Tensor, "cd cd"],
) -> Float[Tensor, "n c"]:
    """Return residuals corrected for what removing their own sample takes from the curvature.

    r̃_i = (I − S_i A_i / n)⁻¹ r_i, S_i = diag p_i − p_i p_iᵀ, A_i = (I ⊗ x_i)ᵀ H⁻¹ (I ⊗ x_i): the rank-c identity of
    Woodbury for (H − (I ⊗ x_i) S_i (I ⊗ x_i)ᵀ / n)⁻¹. With one output it is r_i / (1 − h_i), h_i the leverage. A last
    layer is such a regression on the features that reach it, while those stay as they are. What remains is how
    the curvature changes along the way: it is one Newton step, on a curvature that is right where the step starts.

    Reference: Pregibon, Logistic Regression Diagnostics, 1981; Rad & Maleki, A Scalable Estimate of the
    Out-of-sample Prediction Error via Approximate Leave-one-out, 2020.

    Args:
        features: what enters the layer, with a column of ones where there is a bias.
        chances: softmax of each sample, or the one sigmoid `(n, 1)` of a binary regression.
        residuals: each sample's gradient with respect to its logits, chances − one-hot, or a multiple of it.
        inverse: (H + λI)⁻¹; see `inverse_curvature`.

    Raises:
        ValueError: the shapes do not fit, or a sample alone determines a direction of the curvature (leverage 1).
    """
    n, classes = chances.shape
    if inverse.shape != (classes * features.shape[1],) * 2 or residuals.shape != chances.shape:
        raise ValueError(
            f"residuals, inverse: expected {tuple(chances.shape)} and {(classes * features.shape[1],) * 2},"
            f" got {tuple(residuals.shape)} and {tuple(inverse.shape)}"
        )
    rows = inverse.reshape(classes, features.shape[1], -1)
    quadratic_forms = torch.stack(
        [torch.einsum("ncd,nd->nc", (features @ row).reshape(n, classes, -1), features) for row in rows], dim=1
    )
    correction = torch.eye(classes).to(quadratic_forms) - _softmax_curvature(chances) @ quadratic_forms / n
    if not bool((torch.linalg.eigvals(correction).real > 0).all()):
        raise ValueError(
            "inverse: expected leverages below 1, got more: is it of these features and chances, with λ > 0?"
        )
    return torch.linalg.solve(correction, residuals)


def fit_logistic_regression(
    features: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"],
    classes: int,
    decay: float,
    start: Float[Tensor, "c d"] | None = None,
) -> Float[Tensor, "c d"]:
    """Return the optimum of (1/n) Σ cross entropy + (λ/2) ‖θ‖² by Newton's method, to a gradient below 1e-10.

    Args:
        features: with a column of ones where there is a bias, which is then regularised as well.
        targets: class of each sample.
        classes: how many there are, those without samples included.
        decay: λ.
        start: weights to begin from; zero when None.

    Raises:
        ValueError: λ is not positive, or targets are not among the classes.
        FloatingPointError: it does not converge in 100 steps.
    """
    _check_classes(classes, targets=targets)
    features = features.double()
    shape = classes, features.shape[1]
    weights = features.new_zeros(shape) if start is None else start.double()
    one_hot = F.one_hot(targets.long(), classes).double()
    for _ in range(NEWTON_STEPS):
        probabilities = (features @ weights.T).softmax(1)
        gradient = (probabilities - one_hot).T @ features / len(features) + decay * weights
        if float(gradient.norm()) < 1e-10:
            return weights
        step = torch.linalg.solve(_curvature(features, probabilities, decay), gradient.flatten()).reshape(shape)
        weights = weights - _step_length(weights, step, gradient, features, targets, decay) * step
    raise FloatingPointError(
        f"fit: expected a gradient below 1e-10 after {NEWTON_STEPS} steps, got {gradient.norm():.2g}"
    )


def impact_by_size(
    train: tuple[Float[Tensor, "n d"], Int[Tensor, " n"]],
    query: tuple[Float[Tensor, "q d"], Int[Tensor, " q"]],
    sizes: Sequence[int],
    decay: float,
    draws: int = 3,
    seed: int = 0,
) -> Float[Tensor, "sizes draws"]:
    """Return the mean absolute score of one training sample, Σ |scores| / (q n), in fits to subsets of each size.

    The 1/n of the score alone would halve it when n doubles. The other factors change it: with fewer samples their
    losses are smaller and the queries' larger, and H is flatter. The sum of these effects is measured, not assumed.

    Args:
        train: features, with a column of ones where there is a bias, and classes.
        query: the same of the queries.
        sizes: numbers of training samples, at most n each.
        decay: λ, the same for all sizes.
        draws: random subsets per size.
        seed: of the draws.

    Returns:
        Mean absolute score, in the unit of the loss.

    Raises:
        ValueError: a size is not 1 to n, or λ is not positive.
    """
    features, targets = train[0].double(), train[1]
    if not len(sizes) or min(sizes) < 1 or max(sizes) > len(features):
        raise ValueError(f"sizes: expected numbers from 1 to {len(features)}, got {list(sizes)}")
    classes = int(max(targets.max(), query[1].max())) + 1
    generator = torch.Generator().manual_seed(seed)

    def impact(size: int) -> Tensor:
        indices = torch.randperm(len(features), generator=generator)[:size]
        subset = features[indices], targets[indices]
        weights = fit_logistic_regression(*subset, classes, decay)
        return multinomial_factors(weights, subset, (query[0].double(), query[1]), decay).scores.abs().mean()

    return torch.stack([torch.stack([impact(size) for _ in range(draws)]) for size in sizes])


def _residuals(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability t of the wrong classes and the direction d of the gradient in the logits, t d."""
    one_hot = F.one_hot(targets.long(), logits.shape[1]).to(logits)
    # Not 1 − p of the label, which loses all digits where the sample is fitted.
    wrong = logits.masked_fill(one_hot.bool(), -torch.inf)
    return (wrong.logsumexp(1) - logits.logsumexp(1)).exp(), wrong.softmax(1) - one_hot


def _outer(directions: Tensor, features: Tensor) -> Tensor:
    return (directions[:, :, None] * features[:, None, :]).flatten(1)


def _softmax_curvature(probabilities: Tensor) -> Tensor:
    return torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]


def _curvature(features: Tensor, probabilities: Tensor, decay: float) -> Tensor:
    if not decay > 0:
        raise ValueError(f"decay: expected a positive number, got {decay}")
    if not bool(features.isfinite().all() and probabilities.isfinite().all()):
        raise FloatingPointError("weights, features: expected finite numbers, got NaN or infinity")
    (n, classes), width = probabilities.shape, features.shape[1]
    in_logits = _softmax_curvature(probabilities) / n
    hessian = features.new_zeros(classes, width, classes, width)
    for a in range(classes):
        for b in range(a, classes):
            hessian[a, :, b] = hessian[b, :, a] = (features * in_logits[:, a, b, None]).T @ features
    square = hessian.reshape(classes * width, -1)
    return square + decay * torch.eye(len(square)).to(square)


def _step_length(
    weights: Tensor, step: Tensor, gradient: Tensor, features: Tensor, targets: Tensor, decay: float
) -> float:
    """Return the largest of 1, ½, ¼, ... of a Newton step that lowers the objective as its slope promises."""

    def objective(at: Tensor) -> float:
        return float(F.cross_entropy(features @ at.T, targets.long()) + decay / 2 * at.square().sum())

    before, slope, length = objective(weights), float((gradient * step).sum()), 1.0
    while objective(weights - length * step) > before - 1e-4 * length * slope + 1e-14 and length > 1e-10:
        length /= 2
    return length


def _check_classes(classes: int, **targets: Tensor) -> None:
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, got {classes}; one logit is binary_factors")
    for name, labels in targets.items():
        if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= classes:
            received = f"{int(labels.min())} to {int(labels.max())}" if len(labels) else "none"
            raise ValueError(f"{name}: expected classes from 0 to {classes - 1}, got {received}")
