"""How far training went along each parameter, and the damping that follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_interp.data.batch import at_least_float32
from lightning_interp.influence.damping import Damping

MEASURED_OPTIMIZERS = ("SGD", "Adam", "AdamW")  # in `benchmarks/damping.py`; the rules of others are by analogy
LEAST_DIVISOR = 1e-8  # Adam's own default ε: for optimizers without one, whose divisor can be zero


@dataclass(frozen=True, eq=False)
class Path:
    """How one parameter was trained: θ moves by −rate · (∇L / divisor), plus its weight decay.

    Args:
        optimizer: class of the optimizer.
        steps: optimizer steps in which the parameter had a gradient.
        rate_sum: Σ lr over these steps; Σ lr / (1 − momentum) where momentum adds gradients up instead of averaging.
        weight_decay: of the loss's unit per squared unit of the parameter; per rate where it is decoupled.
        decoupled: whether weight decay bypasses the divisor, as in AdamW.
        divisor: what the gradient is divided by at the end, in the parameter's shape: √v̂ + ε of Adam kinds, v̂ the
            second moment corrected for its start at zero; None for 1, as in SGD.
        idle: how many of the parameter's numbers never had a gradient, as far as the optimizer remembers.

    Raises:
        ValueError: a number is negative, zero where it cannot be, or not finite.
    """

    optimizer: str
    steps: int
    rate_sum: float
    weight_decay: float = 0.0
    decoupled: bool = False
    divisor: Tensor | None = None
    idle: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.rate_sum < math.inf):
            raise ValueError(f"rate_sum: expected a positive sum of learning rates, got {self.rate_sum}")
        if not (0 <= self.weight_decay < math.inf):
            raise ValueError(f"weight_decay: expected a number from 0, got {self.weight_decay}")
        if self.divisor is not None and not bool(((self.divisor > 0) & self.divisor.isfinite()).all()):
            raise ValueError("divisor: expected positive numbers, got some that are not (NaN, infinity or zero)")

    @classmethod
    def of(cls, optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, steps: int, rate_sum: float) -> Path:
        """Read the optimizer's settings and state after training.

        Args:
            optimizer: that trained the parameter.
            group: the parameter's, of `optimizer.param_groups`.
            parameter: as the optimizer knows it.
            steps: it took.
            rate_sum: Σ `rate_of(group)` over them.

        Raises:
            ValueError: the loss was maximised, the optimizer is of another kind, or a number is out of range.
        """
        if group.get("maximize"):
            raise ValueError("maximize: expected a loss that is minimised, got True")
        square = _second_moment(optimizer, group, parameter, steps)
        return cls(
            optimizer=type(optimizer).__name__,
            steps=steps,
            rate_sum=rate_sum,
            weight_decay=float(group.get("weight_decay", 0.0)),
            decoupled=_decoupled(optimizer, group),
            divisor=None if square is None else _divisor(square, float(group.get("eps", 0.0))),
            idle=0 if square is None else int((square == 0).sum()),
        )

    def damping(self, k: float) -> float | Tensor:
        """Return total λ, a number or in the parameter's shape."""
        share = k / self.rate_sum
        if self.divisor is None:
            return self.weight_decay + share
        if self.decoupled:
            return self.divisor * (self.weight_decay + share)
        return self.divisor * share + self.weight_decay


@dataclass(frozen=True)
class Trajectory:
    """What was recorded of one training run, by the names of its parameters.

    Training moves the parameters no further along a direction than its learning rates allow, however flat the loss is
    there; damping limits a Newton step in the same way. Along a flat direction, learning rates that sum to τ reach as
    far as a step damped by 1/τ. With k = 2 times that, the exact curvature ranked retrainings of small networks best,
    or within 0.01 of the best of k = 1, 2, 4 (`benchmarks/damping.py`):

        SGD:   λ = weight decay + k / τ,    τ = Σ lr / (1 − momentum)
        Adam:  Λ = weight decay + k s / Σ lr,    s = √v̂ + ε
        AdamW: Λ = s (weight decay + k / Σ lr)

    Momentum of SGD adds gradients up, by 1 / (1 − momentum) in the long run, with or without Nesterov's variant;
    dampening reduces it. Adam's is an average, which adds nothing. Adam divides each number's gradient by s, which is
    gradient descent in θ √s; a damping of k / Σ lr there is one of k s / Σ lr for θ. AdamW converges where weight
    decay · θ + ∇L / s = 0, that is ∇L + (s · weight decay) θ = 0: as under an L2 penalty of s · weight decay.

    It takes s as it is at the end, and treats training as a descent without noise. EK-FAC, whose eigenvalues are
    another spectrum than the curvature's, ranked them better with 0.1 × their mean.

    Reference: Ali et al., A Continuous-Time View of Early Stopping for Least Squares Regression, 2019; Kingma & Ba,
    Adam, 2015; Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019.

    Args:
        paths: name → how the parameter was trained, without those that never had a step.
        unknown: name → why it is not known how the parameter was trained.
    """

    paths: Mapping[str, Path]
    unknown: Mapping[str, str] = field(default_factory=dict)

    def damping(self, k: float = 2.0) -> Damping | None:
        """Return the damping of each trained parameter; None where there is none, for the reason that `why_not` gives.

        Args:
            k: how much stronger than 1/τ.

        Raises:
            ValueError: k is not positive.
        """
        if not (0 < k < math.inf):
            raise ValueError(f"damping(k=...): expected a positive number, got {k}")
        if self.why_not:
            return None
        values = {name: path.damping(k) for name, path in self.paths.items()}
        numbers = {value if isinstance(value, float) else math.nan for value in values.values()}
        origin = "; ".join(_origins(self.paths.values(), k))
        return Damping(numbers.pop() if len(numbers) == 1 and math.nan not in numbers else values, origin)

    @property
    def why_not(self) -> str:
        """Say why no damping follows; empty if one does."""
        if self.unknown:
            name, why = next(iter(self.unknown.items()))
            more_parameters = f" (and {len(self.unknown) - 1} more)" if len(self.unknown) > 1 else ""
            return f"{name}{more_parameters}: {why}"
        return "" if self.paths else "no step of an optimizer was recorded"

    def state_dict(self) -> dict[str, Any]:
        """Return it as a plain dictionary of tensors and Python's own values."""
        return {"paths": {name: dict(vars(path)) for name, path in self.paths.items()}, "unknown": dict(self.unknown)}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Trajectory:
        """Return what `state_dict` was made from."""
        return cls({name: Path(**path) for name, path in state["paths"].items()}, dict(state["unknown"]))


def rate_of(group: Mapping[str, Any]) -> float:
    """Return how far a step of this parameter group goes in the long run, per gradient over divisor.

    lr, times (1 − dampening) / (1 − momentum) where the group has a momentum that adds steps up.
    """
    rate, momentum = float(group["lr"]), float(group.get("momentum", 0.0))
    if momentum == 0:
        return rate
    return rate * (1 - float(group.get("dampening", 0.0))) / (1 - momentum) if momentum < 1 else math.inf


def _decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Say whether weight decay bypasses the divisor; the groups of older versions of AdamW have no entry for it."""
    return bool(group.get("decoupled_weight_decay", "AdamW" in {kind.__name__ for kind in type(optimizer).__mro__}))


def _divisor(square: Tensor, eps: float) -> Tensor:
    return (square.sqrt() + eps).clamp(min=LEAST_DIVISOR)


def _second_moment(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, steps: int) -> Tensor | None:
    """Return what the optimizer divides gradients by, squared; None if by nothing, as SGD does.

    Adam's kinds: corrected for its start at zero; RMSprop: about the mean where it is centred; Adagrad: a
    quarter of its sum, which grows: the root of it is, in the harmonic mean over the steps, half of what it is at last.
    """
    state = optimizer.state.get(parameter, {})
    if "exp_avg_sq" in state:
        beta, steps_taken = float(group.get("betas", (0.0, 0.0))[1]), float(state.get("step", group.get("step", steps)))
        square = at_least_float32(state.get("max_exp_avg_sq", state["exp_avg_sq"])) / (1 - beta**steps_taken)
    elif "square_avg" in state and "acc_delta" not in state:
        square = at_least_float32(state["square_avg"])
        square = (
            square if "grad_avg" not in state else (square - at_least_float32(state["grad_avg"]).square()).clamp(min=0)
        )
    elif "sum" in state and not group.get("lr_decay"):
        square = at_least_float32(state["sum"]) / 4
    elif isinstance(optimizer, SGD):
        return None
    else:
        raise ValueError("optimizer: expected SGD, or a state with a second moment of the gradients, got neither")
    if square.shape != parameter.shape:
        raise ValueError(
            f"optimizer: expected a second moment for each of {tuple(parameter.shape)} parameters, got"
            f" {tuple(square.shape)}"
        )
    return square


def _origins(paths: Iterable[Path], k: float) -> Iterable[str]:
    """Say for each kind of rule which learning rates were summed."""
    kinds: dict[tuple[str, bool, bool], list[Path]] = {}
    for path in paths:
        kinds.setdefault((path.optimizer, path.divisor is None, path.decoupled), []).append(path)
    return [_origin(paths_of_kind, k) for paths_of_kind in kinds.values()]


def _origin(paths: list[Path], k: float) -> str:
    first = paths[0]
    decay = f"weight decay {_value_range(path.weight_decay for path in paths)}"
    sums, steps = _value_range(path.rate_sum for path in paths), _value_range(path.steps for path in paths)
    caveat = "" if first.optimizer in MEASURED_OPTIMIZERS else " (as if it were one of Adam's kind)"
    if first.divisor is None:
        caveat = caveat and " (as if it were plain SGD)"
        rule, total = f"{decay} + {k:g}/τ", "τ = Σ lr / (1 − momentum)"
    elif first.decoupled:
        rule, total = f"(√v̂ + ε) × ({decay} + {k:g} / Σ lr) per parameter", "Σ lr"
    else:
        rule, total = f"{decay} + {k:g} (√v̂ + ε) / Σ lr per parameter", "Σ lr"
    idle = sum(path.idle for path in paths)
    least = (
        f", {idle:,} of {_size(paths):,} parameters never had a gradient and get the smallest damping" if idle else ""
    )
    return f"{first.optimizer}{caveat}: {rule}, {total} = {sums} over {steps} steps{least}"


def _size(paths: list[Path]) -> int:
    return sum(path.divisor.numel() for path in paths if path.divisor is not None)


def _value_range(numbers: Iterable[float]) -> str:
    values = sorted(set(numbers))
    ends = [f"{values[0]:.3g}", f"{values[-1]:.3g}"] if isinstance(values[0], float) else [f"{n:,}" for n in values]
    return ends[0] if ends[0] == ends[-1] else f"{ends[0]} to {ends[-1]}"
