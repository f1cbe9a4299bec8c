"""Influence functions: which training samples raised or lowered the loss of a query."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_interp.data.batch import device_of, to_device
from lightning_interp.data.samples import Samples, train_and_query_samples
from lightning_interp.data.task import SAMPLES_TO_SETTLE, Task, settle_kind
from lightning_interp.influence.curvature import Curvature
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.estimators.default_curvature import default_curvature
from lightning_interp.influence.estimators.fitted import FittedInfluence
from lightning_interp.influence.estimators.prepared import PreparedInfluence
from lightning_interp.influence.estimators.training_step_check import check_training_step
from lightning_interp.influence.gradients.coverage import SEARCH_SAMPLES, Coverage, find_coverage
from lightning_interp.influence.gradients.distributed import Ranks
from lightning_interp.influence.gradients.reader import SINGLE_PROCESS, Reader
from lightning_interp.influence.results import Influence
from lightning_interp.influence.trajectory import Trajectory
from lightning_interp.network.layers import match_layers
from lightning_interp.network.undisturbed import differentiable
from lightning_interp.progress import Progress, quiet


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
        curvature: `EKFAC()`, `GaussNewton()`, ...; by the size of the network when None (see `default_curvature`).
        damping: total λ, weight decay included; a `Damping`, which may differ by parameter; or a recorded `Trajectory`,
            from which the damping of an exact curvature follows. A curvature that has a damping of its own, as
            Kronecker factors do, takes that when damping is None or a trajectory. All others take 0.1 × the mean
            eigenvalue when it is None.
        layers: names or glob patterns of the layers whose parameters enter; all that are covered when None.
        leverage: take the curvature of a sample away with it, an exact Newton step of leaving it out: for convex models
            and last layers, where it makes the sizes of the scores right; a backward more for each class.
    """

    curvature: Curvature | None = None
    damping: float | Damping | Trajectory | None = None
    layers: Sequence[str] | None = None
    leverage: bool = False

    def __post_init__(self) -> None:
        if self.curvature is not None and (
            isinstance(self.curvature, type) or not isinstance(self.curvature, Curvature)
        ):
            raise TypeError(
                "InfluenceFunction(curvature=...): expected an object with check and fit, such as EKFAC(), or None, got"
                f" {self.curvature!r}"
            )
        number = not isinstance(self.damping, (Damping, Trajectory, type(None)))
        if number and not self.damping > 0:  # type: ignore[operator]
            raise ValueError(f"InfluenceFunction(damping=...): expected a positive number or None, got {self.damping}")

    def known_damping(self) -> Damping | None:
        """Return the damping as given, or as it follows from the trajectory; None where there is neither."""
        if isinstance(self.damping, Trajectory):
            return self.damping.damping()
        return self.damping if isinstance(self.damping, Damping | None) else Damping(self.damping, "given")

    def check(self, model: nn.Module, train: Any, task: Task = Task()) -> None:
        """Check on a few training samples that scores of this model can be computed.

        Before training, this is no substitute for the search of `fit`: a layer that starts at zero sends no gradient
        back, where any rule is right, and other parameters may be trained by the end.

        Raises:
            ValueError: as `fit` would before its first pass over the training samples.
            FloatingPointError: losses are not finite.
        """
        self.prepare(model, train, task)

    def prepare(
        self,
        model: nn.Module,
        train: Any,
        task: Task = Task(),
        progress: Progress = quiet,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> PreparedInfluence:
        """Determine on a few training samples what is needed before a pass over all of them; arguments as for `fit`.

        Raises:
            ValueError: the dataset is empty, no parameter is covered, a pattern names none, or the curvature has too
                many parameters; of a task by training steps, the step is no mean over samples, or the curvature's loss
                is not the step's.
            FloatingPointError: losses are not finite.
        """
        samples = Samples.of(train)
        if not len(samples):
            raise ValueError("train: expected samples, got none")
        with differentiable(model):
            coverage = self._find_coverage(model, samples, task)
            reader = Reader.of(coverage, samples, progress, ranks)
            damping, reason = self.known_damping(), ""
            curvature = self.curvature
            if curvature is None:
                curvature, reason = default_curvature(coverage, damping)
            curvature.check(coverage.size)
        recorded = isinstance(self.damping, Trajectory)
        return PreparedInfluence(
            reader,
            reader.rebatch(samples),
            curvature,
            reason,
            given_damping=None if recorded else damping,
            recorded_damping=damping if recorded else None,
            leverage=self.leverage,
        )

    def fit(
        self,
        model: nn.Module,
        train: Any,
        task: Task = Task(),
        progress: Progress = quiet,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> FittedInfluence:
        """Estimate the curvature, once for any number of queries; the model is left as it was.

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
        return self.prepare(model, train, task, progress, ranks).fit()

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
            query: dataset or loader of the samples whose losses are explained.
            task: how to read batches, call the model, and its loss per sample.
            candidates: indices in `train` to score; all when None. n stays the size of `train`.
            top_k: keep only so many of each query's most helpful and most harmful samples: memory then does not grow
                with `train`.
            progress: shows how far it got.

        Raises:
            ValueError: a dataset is empty, no parameter is covered, or the curvature is zero.
            FloatingPointError: gradients or scores are not finite.
        """
        samples, queries = train_and_query_samples(train, query)
        return self.fit(model, samples, task, progress)(queries, candidates, top_k)

    def _find_coverage(self, model: nn.Module, train: Samples, task: Task) -> Coverage:
        """Settle the task's kind on a few samples, and return what is covered."""
        layers = None if self.layers is None else match_layers(model, self.layers, "InfluenceFunction(layers=...)")
        here = dataclasses.replace(train, workers=0)
        first = to_device(next(iter(here.at(range(min(SEARCH_SAMPLES, len(train)))))), device_of(model))
        if task.step is None:
            task = settle_kind(task, model, first, train.spread(SAMPLES_TO_SETTLE))
        else:
            task = check_training_step(task, model, here, self.curvature)
        coverage = find_coverage(model, task, first, layers)
        if not coverage.blocks:
            trained = [name for name, p in model.named_parameters() if p.requires_grad]
            raise ValueError(
                f"model: expected trained parameters whose gradient reaches the loss, {type(model).__name__} has none"
                f" among {', '.join(trained[:8]) or 'no trained parameters at all'}"
            )
        return coverage
