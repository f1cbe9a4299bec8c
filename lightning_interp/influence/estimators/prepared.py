"""A network made ready for an influence function: coverage, batch size, curvature and damping, before any estimate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_interp.data.samples import Samples
from lightning_interp.data.task import loss_per_sample
from lightning_interp.influence.curvature import Curvature, Fitted
from lightning_interp.influence.curvature.curvature import damping_for, needs_outputs
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.estimators.fitted import FittedInfluence
from lightning_interp.influence.gradients.coverage import Coverage
from lightning_interp.influence.gradients.ggn_columns import MIXTURES, has_random_root
from lightning_interp.influence.gradients.reader import Reader
from lightning_interp.network.undisturbed import differentiable


@dataclass(frozen=True, eq=False)
class PreparedInfluence:
    """What `InfluenceFunction.fit` determines before the first pass over the training samples.

    It can be fitted several times, also with a field replaced: on a few samples for their time, then on all.

    Args:
        reader: how samples go through the network, and which of its parameters are covered.
        train: the training samples.
        curvature: the user's, or the default for this network.
        reason: why it is the default; empty if it is the user's.
        given_damping: the user's.
        recorded_damping: that follows from the recorded training, where the user gave none.
        leverage: whether a sample that is left out takes its own curvature with it.
    """

    reader: Reader
    train: Samples
    curvature: Curvature
    reason: str
    given_damping: Damping | None
    recorded_damping: Damping | None
    leverage: bool

    @property
    def coverage(self) -> Coverage:
        """Which parameters are covered, and how."""
        return self.reader.coverage

    def fit(self) -> FittedInfluence:
        """Estimate the curvature and invert it; the model is left as it was.

        Raises:
            TypeError: the curvature's `fit` or `default_damping` returned something else than they must.
            ValueError: the curvature is zero, or cannot take the damping.
            FloatingPointError: losses are not finite, or the damped curvature is not positive definite.
        """
        with differentiable(self.coverage.model):
            fitted = self._fit_curvature()
            damping = damping_for(self.curvature, fitted, self.given_damping, self.recorded_damping)
            inverse = fitted.inverse(damping.shift(self.coverage))
            notes = tuple(filter(None, (self.reason, *fitted.notes, self._mixture_note(), self._slow_note())))
        return FittedInfluence(self.reader, self.train, self.curvature, fitted, inverse, damping, notes, self.leverage)

    def _fit_curvature(self) -> Fitted:
        fitted = self.curvature.fit(self.reader, self.train)
        # `mean_eigenvalue` may be costly, and is asked for only where damping needs it.
        if missing := [name for name in ("n", "notes", "inverse") if not hasattr(fitted, name)]:
            raise TypeError(
                f"{type(self.curvature).__name__}.fit: expected n, mean_eigenvalue, notes and inverse, got"
                f" {type(fitted).__name__} without {', '.join(missing)}"
            )
        return fitted

    def _mixture_note(self) -> str:
        """Return a note if the curvature is that of random mixtures of classes at many positions, else ""."""
        task, batch = self.coverage.task, self.coverage.batch
        if not needs_outputs(self.curvature) or task.loss is not loss_per_sample:
            return ""
        with torch.no_grad():
            outputs = task.outputs(self.coverage.model, task.inputs(batch))
        if not has_random_root(outputs, task.targets(batch), task):
            return ""
        return f"classes at many positions: the curvature is that of {MIXTURES} random mixtures of them per sample"

    def _slow_note(self) -> str:
        """Return a note if some parameters' gradients take a backward for each sample, else ""."""
        fallback = self.coverage.fallback
        if fallback is None or fallback.vectorised:
            return ""
        names = ", ".join(block.name for block in fallback.blocks)
        return f"{names}: torch.func cannot follow, so each sample has a backward of its own, which is slow"
