"""Perturbed training inputs: which change of a training sample would change a query's loss, and how far it can go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_interp.data.batch import count_samples, select_samples
from lightning_interp.data.samples import Samples
from lightning_interp.data.task import Task
from lightning_interp.influence.curvature import Solver
from lightning_interp.influence.estimators.fitted import FittedInfluence, check_finite, query_gradients
from lightning_interp.influence.estimators.influence_function import InfluenceFunction
from lightning_interp.network.undisturbed import differentiable

TrainOnDataset = Callable[[TensorDataset], nn.Module]


def input_influence(fitted: FittedInfluence, query: Any, places: Sequence[int]) -> Float[Tensor, "q m *shape"]:
    """Return how each query's loss would move per change of each input feature of training samples.

    −(1/n) ∇ℓ_qᵀ (H + Λ)⁻¹ ∇_x∇_θ ℓ(z): the rise of ℓ_q when the network is trained on z with x + δ in place of x, per
    δ. With s_q = (H + Λ)⁻¹ ∇ℓ_q it is the gradient in x of −⟨s_q, ∇_θ ℓ(z)⟩ / n: a second backward through the first.
    It is the slope for small δ; where rectifiers switch, the loss is not as smooth as that assumes.

    Reference: Koh & Liang, Understanding Black-box Predictions via Influence Functions, 2017, section 2.2.

    Args:
        fitted: of `InfluenceFunction.fit`, its curvature one that solves: `GaussNewton`, `EKFAC`, `IdentityCurvature`.
        query: dataset or loader of q samples.
        places: indices of m samples in the training data.

    Returns:
        In the loss's unit per unit of the input: `(q, m, *shape of one input)`.

    Raises:
        TypeError: the inputs are no floats, such as tokens; or the curvature offers no solutions.
        FloatingPointError: gradients are not finite.
    """
    if not isinstance(fitted.inverse, Solver):
        raise TypeError(f"fitted: expected a curvature whose inverse has `solve`, got {fitted.curvature!r}")
    coverage, reader = fitted.coverage, fitted.reader
    with differentiable(coverage.model):
        solutions = fitted.inverse.solve(query_gradients(reader, Samples.of(query)).gradients)
        by_parameter: dict[str, Tensor] = {}
        for name, solution in solutions.items():
            by_parameter |= coverage.blocks[name].unpack(solution)
        batches = reader.batches(fitted.train.at(places), "perturbing training samples")
        slopes = [_input_gradients(coverage.model, coverage.task, batch, by_parameter) for batch in batches]
    return check_finite(-torch.cat(slopes, dim=1) / len(fitted.train), "input influence")


def _input_gradients(
    model: nn.Module, task: Task, batch: Any, vectors: dict[str, Tensor]
) -> Float[Tensor, "q m *shape"]:
    """Return ∇_x ⟨s, ∇_θ ℓ⟩ for each of q vectors s, parameter → `(q, *shape)`."""
    inputs = task.explained(task.inputs(batch))
    if not inputs.is_floating_point():
        raise TypeError(f"train: expected inputs of floats to perturb, got {inputs.dtype}")
    x = inputs.detach().clone().requires_grad_()
    batch = select_samples(batch, torch.arange(count_samples(batch)), inputs, x)
    parameters = [model.get_parameter(name) for name in vectors]
    gradients = torch.autograd.grad(task.losses(model, batch)[2].sum(), parameters, create_graph=True)
    slopes = []
    for vector in zip(*vectors.values(), strict=True):
        # A backward through ∇_θ ℓ, weighted by s, is ∇_x ⟨s, ∇_θ ℓ⟩.
        (slope,) = torch.autograd.grad(gradients, x, vector, retain_graph=True, materialize_grads=True)
        slopes.append(slope.cpu())
    return torch.stack(slopes)


@dataclass(frozen=True, eq=False)
class Crafted:
    """Training inputs that were changed so that the retrained network predicts queries differently.

    Args:
        inputs: as changed, `(m, *shape)`.
        originals: before the change, `(m, *shape)`.
        model: retrained on the changed inputs.
        losses: of the queries, before the first step and after the retraining of each, `(steps + 1, q)`.
    """

    inputs: Tensor
    originals: Tensor
    model: nn.Module
    losses: Float[Tensor, "steps q"]


class Front(NamedTuple):
    """A frozen network before the one that is retrained.

    Args:
        network: inputs → what the model sees.
        inputs: of the training samples that are changed, `(m, *shape)`.
    """

    network: nn.Module
    inputs: Tensor


def never(model: nn.Module) -> bool:
    """Return False, so that every step is taken."""
    return False


@dataclass(frozen=True)
class Steps:
    """How training inputs are changed.

    Args:
        count: most steps that are taken.
        size: of one step, in each feature.
        radius: how far a feature may end from where it was. With pixels of k/255, below 0.5/255 the image's 8-bit file
            is the same.
        low: least value of a feature.
        high: largest value of a feature.
        stop: retrained model → whether to stop.
    """

    count: int = 50
    size: float = 0.1 / 255
    radius: float = 0.49 / 255
    low: float = 0.0
    high: float = 1.0
    stop: Callable[[nn.Module], bool] = never

    def __post_init__(self) -> None:
        for name in ("count", "size", "radius"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Steps({name}=...): expected a positive number, got {getattr(self, name)!r}")

    def ascend(self, inputs: Tensor, slope: Tensor, originals: Tensor) -> Tensor:
        """Return inputs after one step up the slope's sign, within the radius and between low and high."""
        changed = inputs + self.size * slope.sign()
        return changed.clamp(originals - self.radius, originals + self.radius).clamp(self.low, self.high)


def craft(
    estimator: InfluenceFunction,
    retrain: TrainOnDataset,
    train: Any,
    query: Any,
    places: Sequence[int],
    steps: Steps = Steps(),
    front: Front | None = None,
    task: Task = Task(),
) -> Crafted:
    """Change a few training inputs a little so that the retrained network's loss on the queries rises.

    A check of robustness: how much of a prediction depends on how few training samples. x ← Π(x + α sign ∇), ∇ the sum
    over queries of `input_influence` at the changed x, Π back into the radius; after each step the network is retrained
    and the curvature estimated anew. With a `front`, a frozen network before the one that is retrained, the slope is
    passed on through it to its own inputs.

    Reference: Koh & Liang, Understanding Black-box Predictions via Influence Functions, 2017, section 5.2.

    Args:
        estimator: gives the curvature and damping; that of the network's training, weight decay included.
        retrain: dataset → a model trained on it to its optimum.
        train: a `TensorDataset` of inputs (what the front makes of them, if there is one) and targets.
        query: dataset of the samples whose loss is raised, as the model sees them.
        places: indices of the training inputs that are changed.
        steps: how many, how long, and how far.
        front: the network in front of the model, and its inputs at these indices.
        task: how to call the model and its loss.

    Raises:
        TypeError: `train` is no `TensorDataset`, or its inputs are no floats.
        FloatingPointError: gradients are not finite.
    """
    if not isinstance(train, TensorDataset):
        raise TypeError(f"train: expected a TensorDataset of inputs and targets, got {type(train).__name__}")
    indices = list(places)
    before = Front(nn.Identity(), train.tensors[0][indices]) if front is None else front
    crafted = TensorDataset(train.tensors[0].clone(), *train.tensors[1:])
    inputs, losses = before.inputs.clone(), []
    with differentiable(before.network):
        for step in range(steps.count + 1):
            leaf = inputs.clone().requires_grad_()
            model_inputs = before.network(leaf)
            crafted.tensors[0][indices] = model_inputs.detach()
            model = retrain(crafted)
            losses.append(_query_losses(model, query, task))
            if step == steps.count or steps.stop(model):
                break
            rise = input_influence(estimator.fit(model, crafted, task), query, indices).sum(0)
            (slope,) = torch.autograd.grad(model_inputs, leaf, rise.to(model_inputs))
            inputs = steps.ascend(inputs, slope, before.inputs)
    return Crafted(inputs, before.inputs, model, torch.stack(losses))


def _query_losses(model: nn.Module, query: Any, task: Task) -> Float[Tensor, " q"]:
    with differentiable(model), torch.no_grad():
        return torch.cat([task.losses(model, batch)[2] for batch in Samples.of(query)])
