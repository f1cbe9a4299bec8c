"""Retraining of the last layer alone, on fixed features: the actual effect of leaving samples out on that layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor, nn

from lightning_interp.data.batch import at_least_float32, device_of, to_device
from lightning_interp.data.samples import Samples, train_and_query_samples
from lightning_interp.data.task import SAMPLES_TO_SETTLE, Task, settle_kind
from lightning_interp.influence.curvature import KFAC
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.estimators.influence_function import InfluenceFunction
from lightning_interp.influence.last_linear import last_linear
from lightning_interp.influence.trajectory import Trajectory
from lightning_interp.network.undisturbed import hooked, undisturbed
from lightning_interp.progress import Progress, quiet

SLOPE_TOLERANCE = 1e-4  # of the gradient that leaving the samples out causes
FLOAT64_ROUNDING = 1e-15  # of the largest feature: no gradient can be brought below it
NEWTON_TOLERANCE = 1e-2  # a more exact Newton step would not save one while the loss is not quadratic
MOST_NEWTON_STEPS = 30  # a step that is halved counts, too
LARGEST_PROBE = 4  # samples: enough to find which layer is the last
SAMPLES_PER_CHUNK = 8192  # whose outputs and their graph are in memory together
MOST_LAST_LAYER_FEATURES = 2**28  # 1 GB in float32


class Head(NamedTuple):
    """The last layer's inputs and targets for a data set.

    Args:
        features: its inputs, with a one appended where it has a bias, `(n, ..., d)`.
        targets: `(n, ...)`.
        shape: of one output of the network.
    """

    features: Tensor
    targets: Tensor
    shape: tuple[int, ...]

    def chunks(self) -> Iterator[tuple[slice, Head]]:
        """Yield the samples in chunks whose outputs fit in memory."""
        for start in range(0, len(self.features), SAMPLES_PER_CHUNK):
            rows = slice(start, start + SAMPLES_PER_CHUNK)
            yield rows, self._replace(features=self.features[rows], targets=self.targets[rows])

    def losses(self, task: Task, weights: Float[Tensor, "c d"]) -> Float[Tensor, " n"]:
        """Return the loss of each sample under these weights, in their precision."""
        outputs = self.features.to(weights) @ weights.T
        return task.per_sample(outputs.reshape(len(self.features), *self.shape), self.targets)


@dataclass(frozen=True, eq=False)
class LastLayer:
    """A network's last linear layer, retrained from where training left it, on the features that it had then.

    W(S) = argmin (1/|S|) Σ_{i in S} ℓ_i(W) − ⟨g, W⟩ + ½ (W − W*)ᵀ Λ (W − W*): W* are the trained weights, g the mean
    gradient there over all samples, Λ limits how far training could move them. With all samples W* itself is the
    optimum, so that what training left unfinished is not attributed to a sample. The losses are minimised as they are,
    by Newton's method with conjugate gradients, until the gradient is 1e-4 of what leaving the samples out made it.
    What the layers in front would learn differently is not included.

    Its methods `retrain` and `losses` are the functions that `leave_one_out` and `leave_k_out` take.

    Reference: akin to the proximal Bregman objective of Bae et al., If Influence Functions are the Answer, Then What is
    the Question?, 2022.

    Args:
        name: of the layer.
        trained: W*, float64; its last column is the bias where there is one.
        damping: Λ, in that shape.
        task: which loss.
        train: features and targets of the training samples.
        query: features and targets of the queries.
    """

    name: str
    trained: Float[Tensor, "c d"]
    damping: Float[Tensor, "c d"]
    task: Task
    train: Head
    query: Head

    @classmethod
    def of(
        cls,
        model: nn.Module,
        train: Any,
        query: Any,
        task: Task = Task(),
        damping: float | Damping | Trajectory | None = None,
        progress: Progress = quiet,
    ) -> LastLayer:
        """Read the features, in one forward of all samples; they stay in the CPU's memory: 1 GB at most.

        Args:
            model: whose output is that of its last `nn.Linear`; it runs in eval mode, and is left as it was.
            train: training dataset (or a loader, read in dataset order).
            query: dataset or loader of the samples whose losses are computed.
            task: how to read batches, call the model, and its loss per sample.
            damping: Λ, as for `InfluenceFunction`; 0.1 × the mean eigenvalue of the layer's K-FAC when it is None.
            progress: shows how far it got.

        Raises:
            ValueError: a dataset is empty, the model has no such layer, or there are too many features to hold.
        """
        samples, queries = train_and_query_samples(train, query)
        probe = to_device(next(iter(samples.at(range(min(LARGEST_PROBE, len(samples)))))), device_of(model))
        name = last_linear(model, task, probe)
        with undisturbed(model):
            task = settle_kind(task, model, probe, samples.spread(SAMPLES_TO_SETTLE))
        layer = model.get_submodule(name)
        total_damping = InfluenceFunction(damping=damping).known_damping()
        if total_damping is None:
            estimator = InfluenceFunction(KFAC(), layers=[name] if name else None)
            total_damping = estimator.fit(model, samples, task, progress).damping
        with undisturbed(model), torch.no_grad():
            heads = [_read_head(model, name, task, dataset, progress) for dataset in (samples, queries)]
        return cls(name, _weight_and_bias(layer), _damping_of_layer(layer, name, total_damping), task, *heads)

    @property
    def n(self) -> int:
        """Number of training samples."""
        return len(self.train.features)

    def retrain(self, train_indices: Sequence[int]) -> Float[Tensor, "c d"]:
        """Return the weights after training on these samples alone.

        Args:
            train_indices: which of the training samples.

        Raises:
            FloatingPointError: it does not converge, or the damped loss is not convex in the weights.
        """
        shares = self._shares(train_indices)

        def slope_at(weights: Tensor) -> Tensor:
            return self._gradient(shares, weights) - self._mean_gradient + self.damping * (weights - self.trained)

        weights, slope = self.trained, slope_at(self.trained)
        # Where leaving the samples out changes nothing, the slope is rounding alone.
        rounding = FLOAT64_ROUNDING * self.train.features.abs().max() * weights.numel() ** 0.5
        converged = SLOPE_TOLERANCE * slope.norm() + rounding
        step = self._newton_step(shares, weights, slope)
        for _ in range(MOST_NEWTON_STEPS):
            if slope.norm() <= converged:
                return weights
            new_slope = slope_at(weights - step)
            if new_slope.norm() < slope.norm():
                weights, slope = weights - step, new_slope
                step = self._newton_step(shares, weights, slope) if slope.norm() > converged else step
            else:
                # The loss is not quadratic, so that a full step may go too far.
                step = step / 2
        raise FloatingPointError(
            f"retrain: expected {self.name!r} to converge in {MOST_NEWTON_STEPS} steps, its gradient is"
            f" {slope.norm():.2g}"
        )

    def losses(self, weights: Float[Tensor, "c d"]) -> Float[Tensor, " q"]:
        """Return each query's loss under these weights."""
        with torch.no_grad():
            return self.query.losses(self.task, weights)

    @cached_property
    def _mean_gradient(self) -> Float[Tensor, "c d"]:
        return self._gradient(self._shares(range(self.n)), self.trained)

    def _shares(self, train_indices: Sequence[int]) -> Float[Tensor, " n"]:
        """Return 1/|S| for each sample of S, 0 for all others."""
        if not len(train_indices):
            raise ValueError("train_indices: expected indices of training samples, got none")
        return torch.bincount(torch.tensor(list(train_indices)), minlength=self.n).double() / len(train_indices)

    def _gradient(self, shares: Float[Tensor, " n"], weights: Float[Tensor, "c d"]) -> Float[Tensor, "c d"]:
        total = torch.zeros_like(weights)
        with torch.enable_grad():
            for rows, chunk in self.train.chunks():
                leaf = weights.clone().requires_grad_()
                total += torch.autograd.grad(chunk.losses(self.task, leaf) @ shares[rows], leaf)[0]
        return total

    def _newton_step(self, shares: Float[Tensor, " n"], weights: Tensor, slope: Tensor) -> Float[Tensor, "c d"]:
        """Return Newton's step, to 1% of the slope."""

        def product(flat: Any) -> Any:
            vector = torch.from_numpy(flat).reshape(weights.shape)
            curved = self._hessian_product(shares, weights, vector) + self.damping * vector
            if not bool((curved * vector).sum() >= 0):
                raise FloatingPointError(
                    f"retrain: expected a loss that is convex in {self.name!r}, got one that is not"
                )
            return curved.numpy().ravel()

        operator = LinearOperator((weights.numel(), weights.numel()), matvec=product, dtype=np.float64)
        step, _ = cg(operator, slope.numpy().ravel(), rtol=NEWTON_TOLERANCE)
        return torch.from_numpy(step).reshape(weights.shape)

    def _hessian_product(self, shares: Float[Tensor, " n"], weights: Tensor, vector: Tensor) -> Float[Tensor, "c d"]:
        total = torch.zeros_like(weights)
        with torch.enable_grad():
            for rows, chunk in self.train.chunks():
                leaf = weights.clone().requires_grad_()
                loss = chunk.losses(self.task, leaf) @ shares[rows]
                (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
                total += torch.autograd.grad(gradient, leaf, vector)[0]
        return total


def _read_head(model: nn.Module, name: str, task: Task, samples: Samples, progress: Progress) -> Head:
    """Return the features that reach a layer, and the targets."""
    device = device_of(model)
    shape: tuple[int, ...] = ()
    features: list[Tensor] = []
    targets: list[Tensor] = []
    with hooked(model, [name], lambda _, __, args, ___: features.append(at_least_float32(args[0]).cpu())):
        for batch in progress(samples, -(-len(samples) // samples.batch_size), "features of the last layer"):
            batch = to_device(batch, device)
            shape = tuple(task.outputs(model, task.inputs(batch)).shape[1:])
            targets.append(task.targets(batch).cpu())
            elements = features[0].numel() // len(features[0]) * len(samples)
            if elements > MOST_LAST_LAYER_FEATURES:
                raise ValueError(
                    f"train, query: expected at most {MOST_LAST_LAYER_FEATURES:,} features of the last layer to hold,"
                    f" got {elements:,}"
                )
    inputs = torch.cat(features)
    if model.get_submodule(name).bias is not None:
        inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
    return Head(inputs, torch.cat(targets), shape)


def _weight_and_bias(layer: nn.Module) -> Float[Tensor, "c d"]:
    columns: list[Tensor] = [layer.get_parameter("weight")]
    if layer.bias is not None:
        columns.append(layer.get_parameter("bias")[:, None])
    return torch.cat(columns, dim=1).detach().cpu().double()


def _damping_of_layer(layer: nn.Module, name: str, damping: Damping) -> Float[Tensor, "c d"]:
    """Return the damping of a layer's weights, and of its bias as their last column."""
    columns = [
        torch.as_tensor(damping.on(f"{name}.{key}" if name else key), dtype=torch.float64, device=p.device)
        .expand(p.shape)
        .reshape(len(p), -1)
        for key, p in layer.named_parameters()
    ]
    return torch.cat(columns, dim=1).detach().cpu().double()
