"""Layer-wise relevance propagation by the epsilon rule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_interp.attribution.engine.forward_backward import INPUT, PassResult
from lightning_interp.attribution.engine.relu_rules import rectifier_ceiling
from lightning_interp.attribution.engine.single_pass import SinglePass
from lightning_interp.attribution.engine.target import OfTarget, select
from lightning_interp.attribution.saliency import of_input
from lightning_interp.data.batch import at_least_float32

DEFAULT_EPSILON = 1e-2  # small beside outputs of the order of 1, above the rounding of bfloat16 (4e-3)
CONVOLUTIONS = tuple(f"conv{kind}{size}d" for kind in ("", "_transpose") for size in (1, 2, 3))
LINEAR_FUNCTIONS = frozenset((*CONVOLUTIONS, "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"))
# Those with f(0) = 0 whose gradient is not f(z) / z, as that of a ReLU or leaky ReLU is.
CURVED_ACTIVATIONS = frozenset(
    ["relu6", "hardtanh", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "tanh"]
)


@dataclass(frozen=True)
class LRP(SinglePass):
    """Relevance of each input: the target's logit, handed down layer by layer in the shares in which it came about.

    R_i = Σ_j a_i w_ij / (z_j + ε sign z_j) · R_j at each linear or convolution layer z_j = Σ_i a_i w_ij + b_j, from
    R = logit_target at the output; signed, in the shape of x; for token ids the sum over the embedding's dimensions,
    `(n, tokens)`. sign 0 = 1: an output of exactly 0 has no relevance to hand down. Activations with f(0) = 0 hand
    relevance through unchanged, a maximum to where it was, sums and means in proportion. What the biases contributed
    stays with them, and ε takes a share ε / (|z| + ε): the sum of a map less the logit is `facts["conservation_gap"]`.

    A larger ε damps what came about by terms that nearly cancel. As ε → 0 the map of a network of ReLUs becomes that of
    `InputXGradient`. Batch normalisation in eval mode is affine, and its constant counts as a bias. Where a function
    multiplies activations with each other or scales them by their own statistics (attention, layer and group
    normalisation, gated and recurrent layers), its gradient is taken as it is: relevance is not conserved there, and
    the gap says by how much. The projections inside `nn.MultiheadAttention` are not stabilised.

    References: Bach et al., On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance
    Propagation, 2015; Montavon et al., Layer-Wise Relevance Propagation: An Overview, 2019.

    Args:
        epsilon: ε, in the unit of the layers' outputs.
    """

    epsilon: float = DEFAULT_EPSILON

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < float("inf"):
            raise ValueError(f"LRP(epsilon=...): expected a positive number, got {self.epsilon!r}")

    @property
    def name(self) -> str:
        """Tag of the method."""
        return "LRP" if self.epsilon == DEFAULT_EPSILON else f"LRP_{self.epsilon:g}"

    @property
    def goal(self) -> OfTarget:
        """What is handed down: the target's logit."""
        return OfTarget()

    @property
    def rule(self) -> EpsilonRule:
        """How a layer hands it down."""
        return EpsilonRule(self.epsilon)

    @property
    def at(self) -> str:
        """Where: at the input."""
        return INPUT

    def read(self, result: PassResult, layer: str) -> Tensor:
        """Return the relevance; of tokens its sum over dimensions."""
        relevance = of_input(result.values) * of_input(result.gradient)
        return relevance.sum(-1) if result.explained.tokens else relevance

    def facts(self, result: PassResult, maps: Float[Tensor, "n *shape"]) -> Mapping[str, Float[Tensor, " n"]]:
        """Return the sum of each map less the logit."""
        logits = at_least_float32(select(result.outputs, result.target))
        return {"conservation_gap": (maps.flatten(1).sum(1) - logits).float()}


@dataclass(frozen=True)
class EpsilonRule:
    """A backward by which the gradient at a layer's output times that output is its relevance.

    With G the gradient that comes back and R = z ⊙ G: a linear function passes G · z / (z + ε sign z) to its own
    backward, and an activation a = f(z) passes G · a / z.

    Args:
        epsilon: ε, in the unit of the layers' outputs.
    """

    epsilon: float

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Open the context in which the forward runs.

        Raises:
            ValueError: no linear function was called on what is explained.
        """
        with _RelevanceMode(self.epsilon) as mode:
            yield
        if not mode.met_linear:
            raise ValueError("model: expected linear or convolution layers in forward, got none that the input reaches")


class _RelevanceMode(TorchFunctionMode):
    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon, self.met_linear = epsilon, False

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        # A ReLU's own gradient is f(z) / z; a clamp from zero to a ceiling is what ReLU6 is.
        if name in CURVED_ACTIVATIONS or rectifier_ceiling(func, args, kwargs) not in (None, float("inf")):
            return self._activation(func, args, kwargs)
        output = func(*args, **kwargs)
        if name not in LINEAR_FUNCTIONS or _count_differentiable((*args, *kwargs.values())) != 1:
            return output
        self.met_linear = True
        z = at_least_float32(output.detach())
        share = z / (z + self.epsilon * torch.where(z < 0, -1.0, 1.0).to(z))
        return _ScaledGradient.apply(output, output.detach(), share.to(output.dtype))  # type: ignore[no-untyped-call]

    def _activation(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return f(z), whose backward is the slope f(z) / z of the line through the origin; 0 at z = 0."""
        z = args[0] if args else kwargs["input"]
        if not z.requires_grad:
            return func(*args, **kwargs)
        with torch.no_grad():
            copy = z.clone()  # f may write into it
            value = func(copy, *args[1:], **{key: option for key, option in kwargs.items() if key != "input"})
            slope = torch.where(z == 0, torch.zeros_like(z), value / z)
        output = _ScaledGradient.apply(z, value, slope)  # type: ignore[no-untyped-call]
        return z.copy_(output) if value is copy else output


class _ScaledGradient(torch.autograd.Function):
    """The value of a function of x, with a given factor in place of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return gradient * factor, None, None


def _count_differentiable(arguments: Sequence[Any]) -> int:
    """Return how many tensors among a function's arguments have a gradient: a product of two such is not linear."""
    # einsum may take its operands as one list.
    items = [item for argument in arguments for item in (argument if isinstance(argument, list) else [argument])]
    return sum(isinstance(item, Tensor) and item.requires_grad for item in items)
