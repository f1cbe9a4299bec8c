"""Retraining of the last layer alone, the features staying as they are: what leaving samples out really does to it."""

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
from lightning_interp.influence.trajectory import Trajectory
from lightning_interp.network.undisturbed import hooked, undisturbed
from lightning_interp.progress import Progress, quiet

CLOSE = 1e-4

ROUNDING = 1e-15

PROBED = 4

STEP_CLOSE = 1e-2

MOST_STEPS = 30

AT_ONCE = 8192

MOST_HELD = 2**28

ROUNDED = 2e-2

FAR = 9.0


class Head(NamedTuple):
    """What of a data set reaches the last layer.

    Args:
        features: its inputs, with a one behind them where it has a bias, `(n, ..., d)`.
        targets: `(n, ...)`.
        shape: of one output of the network.
    """

    features: Tensor
    targets: Tensor
    shape: tuple[int, ...]

    def parts(self) -> Iterator[tuple[slice, Head]]:
        """Yield so many samples at once that their outputs fit in memory."""
        for start in range(0, len(self.features), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            yield rows, self._replace(features=self.features[rows], targets=self.targets[rows])

    def losses(self, task: Task, weights: Float[Tensor, "c d"]) -> Float[Tensor, " n"]:
        """Return the loss of each sample under these weights, in their precision."""
        outputs = self.features.to(weights) @ weights.T
        return task.per_sample(outputs.reshape(len(self.features), *self.shape), self.targets)


@dataclass(frozen=True, eq=False)
class LastLayer:
    """A network's last linear layer, retrained from where training left it, on the features that it had then.

    W(S) = argmin (1/|S|) Σ_{i in S} ℓ_i(W) − ⟨g, W⟩ + ½ (W − W*)ᵀ Λ (W − W*): W* are the trained weights, g the mean
    gradient there over all samples, Λ says how far training could move them. With all samples W* itself is the optimum,
    so that what training left unfinished is not taken for a sample's doing. The losses are minimised as they are, by
    Newton's method with conjugate gradients, until the gradient is 1e-4 of what leaving the samples out made it. What
    the layers in front would learn otherwise is not in it.

    Its two functions are those that `leave_one_out` and `leave_k_out` ask for.

    Reference: akin to the proximal Bregman objective of Bae et al., If Influence Functions are the Answer, Then What is
    the Question?, 2022.

    Args:
        name: of the layer.
        trained: W*, float64; its last column is the bias where there is one.
        damping: Λ, in that shape.
        task: which loss.
        train: features and targets of the training samples.
        query: of the samples that are asked about.
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
        """Read the features, in one forward of all samples; they are held in the CPU's memory: 1 GB at most.

        Args:
            model: whose output is that of its last `nn.Linear`; it runs in eval mode, and is left as it was.
            train: training dataset (or a loader, read in dataset order).
            query: dataset or loader of the samples whose losses are asked about.
            task: how to read batches, call the model, and its loss per sample.
            damping: Λ, as for `InfluenceFunction`; 0.1 × the mean eigenvalue of the layer's K-FAC when it is None.
            progress: shows how far it got.

        Raises:
            ValueError: a dataset is empty, the model has no such layer, or there are too many features to hold.
        """
        samples, asked = train_and_query_samples(train, query)
        few = to_device(next(iter(samples.at(range(min(PROBED, len(samples)))))), device_of(model))
        name = last_linear(model, task, few)
        with undisturbed(model):
            task = settle_kind(task, model, few, samples.spread(SAMPLES_TO_SETTLE))
        layer = model.get_submodule(name)
        known = InfluenceFunction(damping=damping).known_damping()
        if known is None:
            own = InfluenceFunction(KFAC(), layers=[name] if name else None)
            known = own.fit(model, samples, task, progress).damping
        with undisturbed(model), torch.no_grad():
            heads = [_head(model, name, task, held, progress) for held in (samples, asked)]
        return cls(name, _trained(layer), _spread(layer, name, known), task, *heads)

    @property
    def n(self) -> int:
        """Number of training samples."""
        return len(self.train.features)

    def retrain(self, kept: Sequence[int]) -> Float[Tensor, "c d"]:
        """Return the weights after training on these samples alone.

        Args:
            kept: places among the training samples.

        Raises:
            FloatingPointError: it does not converge, or the damped loss is not convex in the weights.
        """
        weights = self._shares(kept)

        def slope(at: Tensor) -> Tensor:
            return self._gradient(weights, at) - self._mean_gradient + self.damping * (at - self.trained)

        at, found = self.trained, slope(self.trained)
        enough = CLOSE * found.norm() + ROUNDING * self.train.features.abs().max() * at.numel() ** 0.5
        step = self._step(weights, at, found)
        for _ in range(MOST_STEPS):
            if found.norm() <= enough:
                return at
            new = slope(at - step)
            if new.norm() < found.norm():
                at, found = at - step, new
                step = self._step(weights, at, found) if found.norm() > enough else step
            else:
                step = step / 2
        raise FloatingPointError(
            f"retrain: expected {self.name!r} to converge in {MOST_STEPS} steps, its gradient is {found.norm():.2g}"
        )

    def losses(self, weights: Float[Tensor, "c d"]) -> Float[Tensor, " q"]:
        """Return each query's loss under these weights."""
        with torch.no_grad():
            return self.query.losses(self.task, weights)

    @cached_property
    def _mean_gradient(self) -> Float[Tensor, "c d"]:
        return self._gradient(self._shares(range(self.n)), self.trained)

    def _shares(self, kept: Sequence[int]) -> Float[Tensor, " n"]:
        """Return 1/|S| for each sample that is kept, 0 for the others."""
        if not len(kept):
            raise ValueError("kept: expected places of training samples, got none")
        return torch.bincount(torch.tensor(list(kept)), minlength=self.n).double() / len(kept)

    def _gradient(self, shares: Float[Tensor, " n"], at: Float[Tensor, "c d"]) -> Float[Tensor, "c d"]:
        total = torch.zeros_like(at)
        with torch.enable_grad():
            for rows, part in self.train.parts():
                free = at.clone().requires_grad_()
                total += torch.autograd.grad(part.losses(self.task, free) @ shares[rows], free)[0]
        return total

    def _step(self, shares: Float[Tensor, " n"], at: Tensor, slope: Tensor) -> Float[Tensor, "c d"]:
        """Return Newton's step, to 1% of the slope."""

        def product(flat: Any) -> Any:
            vector = torch.from_numpy(flat).reshape(at.shape)
            found = self._curved(shares, at, vector) + self.damping * vector
            if not bool((found * vector).sum() >= 0):
                raise FloatingPointError(
                    f"retrain: expected a loss that is convex in {self.name!r}, got one that is not"
                )
            return found.numpy().ravel()

        operator = LinearOperator((at.numel(), at.numel()), matvec=product, dtype=np.float64)
        found, _ = cg(operator, slope.numpy().ravel(), rtol=STEP_CLOSE)
        return torch.from_numpy(found).reshape(at.shape)

    def _curved(self, shares: Float[Tensor, " n"], at: Tensor, vector: Tensor) -> Float[Tensor, "c d"]:
        total = torch.zeros_like(at)
        with torch.enable_grad():
            for rows, part in self.train.parts():
                free = at.clone().requires_grad_()
                loss = part.losses(self.task, free) @ shares[rows]
                (gradient,) = torch.autograd.grad(loss, free, create_graph=True)
                total += torch.autograd.grad(gradient, free, vector)[0]
        return total


def _head(model: nn.Module, name: str, task: Task, samples: Samples, progress: Progress) -> Head:
    """Return the features that reach a layer, and the targets."""
    device = device_of(model)
    shape: tuple[int, ...] = ()
    features: list[Tensor] = []
    targets: list[Tensor] = []
    with hooked(model, [name], lambda _, __, given, ___: features.append(at_least_float32(given[0]).cpu())):
        for batch in progress(samples, -(-len(samples) // samples.batch_size), "features of the last layer"):
            batch = to_device(batch, device)
            shape = tuple(task.outputs(model, task.inputs(batch)).shape[1:])
            targets.append(task.targets(batch).cpu())
            held = features[0].numel() // len(features[0]) * len(samples)
            if held > MOST_HELD:
                raise ValueError(
                    f"train, query: expected at most {MOST_HELD:,} features of the last layer to hold, got {held:,}"
                )
    found = torch.cat(features)
    if model.get_submodule(name).bias is not None:
        found = torch.cat([found, torch.ones_like(found[..., :1])], dim=-1)
    return Head(found, torch.cat(targets), shape)


def _trained(layer: nn.Module) -> Float[Tensor, "c d"]:
    parts = [layer.get_parameter("weight")] + ([] if layer.bias is None else [layer.get_parameter("bias")[:, None]])
    return torch.cat(parts, dim=1).detach().cpu().double()


def _spread(layer: nn.Module, name: str, damping: Damping) -> Float[Tensor, "c d"]:
    """Return the damping of a layer's weights, and of its bias as their last column."""
    parts = [
        torch.as_tensor(damping.on(f"{name}.{key}" if name else key), dtype=torch.float64, device=p.device)
        .expand(p.shape)
        .reshape(len(p), -1)
        for key, p in layer.named_parameters()
    ]
    return torch.cat(parts, dim=1).detach().cpu().double()


def last_linear(model: nn.Module, task: Task, batch: Any) -> str:
    """Return the name of the linear layer whose output is the network's own.

    Args:
        model: it runs in eval mode, and is left as it was.
        task: how to call it, and its loss per sample.
        batch: of a few samples.

    Raises:
        ValueError: there is none, it is no plain linear layer with trained parameters of its own, or the loss is that
            of training steps, or cannot be taken of float64 on the CPU.
    """
    if task.step is not None:
        raise ValueError(
            "task: expected a loss of outputs and targets to retrain the last layer by, got training steps"
        )
    calls: list[tuple[str, Any, Tensor]] = []
    batch = to_device(batch, device_of(model))
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    noting = hooked(model, names, lambda name, _, given, made: calls.append((name, given, made)))
    with undisturbed(model), torch.no_grad():
        with noting:
            outputs = task.outputs(model, task.inputs(batch))
        name, given, made = next(filter(lambda call: _same(call[2], outputs), reversed(calls)), ("", (), None))
        other = None if made is None else torch.randn_like(made) * FAR
        with hooked(model, names, lambda called, *_: other if called == name else None):
            replaced = task.outputs(model, task.inputs(batch))
    if made is None or other is None or not _same(other, replaced):
        raise ValueError(
            "model: expected outputs that are those of a last nn.Linear, to retrain it alone; those of"
            f" {type(model).__name__} are of another shape, or changed behind it"
        )
    if [called for called, _, _ in calls].count(name) > 1:
        raise ValueError(f"model: expected a last layer that is called once, got {name!r}, which is called again")
    _check_plain(model, name, given, made)
    _check_loss(task, outputs, task.targets(batch))
    return name


def _same(made: Tensor, outputs: Tensor) -> bool:
    """Say whether outputs are those of a layer, sample by sample, in one shape or another."""
    alike = made.numel() == outputs.numel() and len(made) == len(outputs)
    return alike and torch.equal(made.flatten(), outputs.to(made).flatten())


def _check_plain(model: nn.Module, name: str, given: tuple[Any, ...], made: Tensor) -> None:
    layer = model.get_submodule(name)
    own = dict(layer.named_parameters())
    weight, bias = own.get("weight"), own.get("bias")
    owners = [held for held, p in model.named_parameters(remove_duplicate=False) if weight is not None and p is weight]
    wanted = f"{name}.weight" if name else "weight"
    if owners != [wanted] or len(own) != 1 + (bias is not None):
        others = [held for held in owners if held != wanted]
        raise ValueError(
            f"model: expected a last layer with a weight of its own, got {name!r}, whose weight is "
            + (f"also {' and '.join(others)}" if others else f"made of {', '.join(own)}")
        )
    if not all(p.requires_grad for p in own.values()):
        raise ValueError(f"model: expected a last layer that is trained, got {name!r}, which is frozen, or its bias is")
    if len(given) != 1 or not _plain(given[0], own["weight"], bias, made):
        raise ValueError(
            f"model: expected a last layer that is called as layer(x) and returns W x + b, got {name!r}, a"
            f" {type(layer).__name__} that does not"
        )


def _plain(given: Tensor, weight: Tensor, bias: Tensor | None, made: Tensor) -> bool:
    """Say whether a layer returns W x + b, as closely as half precision would."""
    made = made.to(weight)
    wanted = nn.functional.linear(given.to(weight), weight, bias)
    return torch.allclose(wanted, made, rtol=ROUNDED, atol=ROUNDED * float(made.abs().max()))


def _check_loss(task: Task, outputs: Tensor, targets: Tensor) -> None:
    with torch.enable_grad():
        free = outputs.detach().cpu().double().requires_grad_()
        try:
            (slope,) = torch.autograd.grad(task.per_sample(free, targets.cpu()).sum(), free, create_graph=True)
            if slope.requires_grad:
                torch.autograd.grad(slope.sum(), free)
        except RuntimeError as error:
            raise ValueError(
                "task: expected a loss with two derivatives in outputs of float64 on the CPU (its own tensors are to"
                f" follow the outputs), to retrain the last layer by; got: {error}"
            ) from error
