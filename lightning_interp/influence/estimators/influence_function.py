"""Influence functions: which training samples raised or lowered the loss of a query."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_interp.data.batch import device_of, to_device
from lightning_interp.data.samples import Samples, train_and_query_samples
from lightning_interp.data.task import SAMPLES_TO_SETTLE, Task, loss_per_sample, settle_kind
from lightning_interp.influence.curvature import EKFAC, KFAC, Curvature, IdentityCurvature
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.estimators.default_curvature import default_curvature
from lightning_interp.influence.estimators.fitted import FittedInfluence
from lightning_interp.influence.estimators.training_step_check import check_training_step
from lightning_interp.influence.gradients.coverage import Coverage, find_coverage
from lightning_interp.influence.gradients.distributed import Ranks
from lightning_interp.influence.gradients.ggn_columns import MIXTURES, has_random_root
from lightning_interp.influence.gradients.reader import SINGLE_PROCESS, Reader
from lightning_interp.influence.results import Influence
from lightning_interp.influence.trajectory import Trajectory
from lightning_interp.network.layers import match_layers
from lightning_interp.network.undisturbed import differentiable
from lightning_interp.progress import Progress, quiet

DAMPING_SHARE = 0.1


@dataclass(frozen=True)
class InfluenceFunction:
    """Influence of leaving out a training sample, by one Newton step from the trained parameters.

    scores[q, i] = (1/n) ∇ℓ_qᵀ (H + Λ)⁻¹ ∇ℓ_i: the predicted rise of query q's loss when sample i is left out and
    the others keep their weight 1/n, in the loss's unit. Positive is helpful. What is trained but has no per-sample
    gradient is named in `Influence.left_out`. It is exact in the limit of a small change at an optimum; far from one,
    or where the network is strongly curved, the order of the scores is better than their size.

    Reference: Koh & Liang, Understanding Black-box Predictions via Influence Functions, 2017 (scores are
    −I_up,loss / n there).

    Args:
        curvature: `EKFAC()`, `GaussNewton()`, ...; by the size of the network when None (see `choose`).
        damping: total λ, weight decay included; a `Damping`, which may differ by parameter; a recorded `Trajectory`,
            from which the damping of an exact curvature follows; 0.1 × the mean eigenvalue of the curvature when None,
            and for Kronecker factors, which a trajectory's damping serves worse.
        layers: names or glob patterns of the layers whose parameters enter; all that are covered when None.
        leverage: take the curvature of a sample away with it, an exact Newton step of leaving it out: for convex models
            and last layers, where it makes the sizes of the scores right; a backward more for each class.
    """

    curvature: Curvature | None = None
    damping: float | Damping | Trajectory | None = None
    layers: Sequence[str] | None = None
    leverage: bool = False

    def __post_init__(self) -> None:
        number = not isinstance(self.damping, (Damping, Trajectory, type(None)))
        if number and not self.damping > 0:  # type: ignore[operator]
            raise ValueError(f"InfluenceFunction(damping=...): expected a positive number or None, got {self.damping}")

    def known_damping(self) -> Damping | None:
        """Return the damping as given, or as it follows from the trajectory; None where neither says it."""
        if isinstance(self.damping, Trajectory):
            return self.damping.damping()
        return self.damping if isinstance(self.damping, Damping | None) else Damping(self.damping, "given")

    def check(self, model: nn.Module, train: Any, task: Task = Task()) -> None:
        """Find out on a few training samples whether this model can be scored.

        Raises:
            ValueError: no parameter is covered, a pattern names none, or the curvature has too many parameters.
            FloatingPointError: losses are not finite.
        """
        with differentiable(model):
            samples = Samples.of(train)
            _, coverage = _covered(model, samples, task, self.layers, self.curvature)
            if self.curvature is not None:
                self.curvature.check(coverage.size)

    def chosen(self, model: nn.Module, train: Any, task: Task = Task()) -> tuple[Curvature, str]:
        """Return the curvature that `fit` would take, and why; empty where it was given.

        Args:
            model: any module.
            train: training dataset.
            task: how to read batches, call the model, and its loss per sample.
        """
        if self.curvature is not None:
            return self.curvature, ""
        with differentiable(model):
            few, coverage = _covered(model, Samples.of(train), task, self.layers, self.curvature)
            return default_curvature(coverage, few, self.known_damping())

    def fit(
        self,
        model: nn.Module,
        train: Any,
        task: Task = Task(),
        progress: Progress = quiet,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> FittedInfluence:
        """Estimate the curvature, once for any number of questions; the model is left as it was.

        Args:
            model: any module; it runs in eval mode, batch normalisation and dropout with it.
            train: training dataset (or a loader, read in dataset order): sample i is `dataset[i]`.
            task: how to read batches, call the model, and its loss per sample.
            progress: shows how far it got.
            ranks: the processes that share the work; all call this.

        Raises:
            ValueError: the dataset is empty, no parameter is covered, or the curvature is zero; of a task by training
                steps, the step is no mean over samples, or the curvature's loss is not the step's.
            FloatingPointError: losses are not finite, or the damped curvature is not positive definite.
        """
        samples = Samples.of(train)
        if not len(samples):
            raise ValueError("train: expected samples, got none")
        with differentiable(model):
            few, coverage = _covered(model, samples, task, self.layers, self.curvature)
            reader = Reader.of(coverage, samples, progress, ranks)
            samples = reader.rebatch(samples)
            damping = self.known_damping()
            curvature, why = (
                (self.curvature, "") if self.curvature is not None else default_curvature(coverage, few, damping)
            )
            curvature.check(coverage.size)
            fitted = curvature.fit(reader, samples)
            if isinstance(curvature, EKFAC | KFAC) and isinstance(self.damping, Trajectory):
                damping = None
            damping = damping or _share(fitted.mean_eigenvalue)
            inverse = fitted.inverse(damping.shift(coverage))
            notes = tuple(filter(None, (why, *fitted.notes, *_said(coverage, few, curvature))))
        return FittedInfluence(reader, samples, curvature, fitted, inverse, damping, notes, self.leverage)

    def __call__(
        self,
        model: nn.Module,
        train: Any,
        query: Any,
        task: Task = Task(),
        candidates: Sequence[int] | None = None,
        top_k: int | None = None,
        progress: Progress = quiet,
    ) -> Influence:
        """Score training samples for each query.

        Args:
            model: any module; it runs in eval mode, batch normalisation and dropout with it.
            train: training dataset (or a loader, read in dataset order): sample i is `dataset[i]`.
            query: dataset or loader of the samples whose losses are asked about.
            task: how to read batches, call the model, and its loss per sample.
            candidates: places in `train` to score; all when None. n stays the size of `train`.
            top_k: keep only so many of each query's most helpful and most harmful samples: memory then does not grow
                with `train`.
            progress: shows how far it got.

        Raises:
            ValueError: a dataset is empty, no parameter is covered, or the curvature is zero.
            FloatingPointError: gradients or scores are not finite.
        """
        samples, asked = train_and_query_samples(train, query)
        return self.fit(model, samples, task, progress)(asked, candidates, top_k)


def _covered(
    model: nn.Module, train: Samples, task: Task, patterns: Sequence[str] | None, curvature: Curvature | None
) -> tuple[Any, Coverage]:
    """Return a few samples on the model's device, and what is covered."""
    layers = None if patterns is None else match_layers(model, patterns, "InfluenceFunction(layers=...)")
    here = dataclasses.replace(train, workers=0)
    few = to_device(next(iter(here.at(range(min(3, len(train)))))), device_of(model))
    if task.step is None:
        task = settle_kind(task, model, few, train.spread(SAMPLES_TO_SETTLE))
    else:
        task = check_training_step(task, model, here, curvature)
    coverage = find_coverage(model, task, few, layers)
    if not coverage.blocks:
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        raise ValueError(
            f"model: expected trained parameters whose gradient reaches the loss, {type(model).__name__} has none among"
            f" {', '.join(trained[:8]) or 'no trained parameters at all'}"
        )
    return few, coverage


def _said(coverage: Coverage, few: Any, curvature: Curvature) -> list[str]:
    """Return what to say of how gradients and curvature come about."""
    task, said = coverage.task, []
    if not isinstance(curvature, IdentityCurvature) and task.loss is loss_per_sample:
        with torch.no_grad():
            outputs = task.outputs(coverage.model, task.inputs(few))
        if has_random_root(outputs, task.targets(few), task):
            said.append(
                f"classes at many positions: the curvature is that of {MIXTURES} random mixtures of them per sample"
            )
    if coverage.fallback is not None and not coverage.fallback.vectorised:
        names = ", ".join(block.name for block in coverage.fallback.blocks)
        said.append(f"{names}: torch.func cannot follow, so each sample has a backward of its own, which is slow")
    return said


def _share(mean_eigenvalue: float) -> Damping:
    found = DAMPING_SHARE * mean_eigenvalue
    if not found > 0:
        raise ValueError("damping: the curvature to take it from is zero (is the softmax saturated?); pass damping=")
    return Damping(found, f"{DAMPING_SHARE} × the mean eigenvalue of the curvature")
