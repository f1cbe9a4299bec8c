"""Influence functions: which training samples raised or lowered the loss of a query."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp.batch import device_of, size, take, to_device
from lightning_interp.capture import differentiable
from lightning_interp.influence.curvature import EKFAC, Curvature, Fitted
from lightning_interp.influence.curvature.loss import DRAWS, hessian_root, is_mixed
from lightning_interp.influence.gradients import Gradients, Trace, layers_of, parameters_of, verified_layers
from lightning_interp.layers import match_layers
from lightning_interp.progress import Progress, quiet
from lightning_interp.records import Influence
from lightning_interp.samples import Samples
from lightning_interp.task import SETTLED_BY, Task, settled

ELEMENTS_AT_ONCE = 2**25
DAMPING_SHARE = 0.1


@dataclass(frozen=True)
class InfluenceFunction:
    """Influence of leaving out a training sample, by one Newton step from the trained parameters.

    scores[q, i] = (1/n) ∇ℓ_qᵀ (H + λI)⁻¹ ∇ℓ_i: the predicted rise of query q's loss when sample i is left out and
    the others keep their weight 1/n, in the loss's unit. Positive is helpful. Over the weights and biases of
    linear and convolutional layers; what else is trained is named in `Influence.left_out`. It is exact in the
    limit of a small change at an optimum; far from one, or where the network is strongly curved, the order of the
    scores is better than their size.

    Reference: Koh & Liang, Understanding Black-box Predictions via Influence Functions, 2017 (scores are
    −I_up,loss / n there).

    Args:
        curvature: `EKFAC()` or `GaussNewton()`.
        damping: total λ, weight decay included; 0.1 × the mean eigenvalue of the curvature when None.
        layers: names or glob patterns of the layers whose parameters enter; all that are covered when None.
    """

    curvature: Curvature = field(default_factory=EKFAC)
    damping: float | None = None
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.damping is not None and not self.damping > 0:
            raise ValueError(f"InfluenceFunction(damping=...): expected a positive number or None, got {self.damping}")

    def check(self, model: nn.Module, train: Any, task: Task = Task()) -> None:
        """Find out on a few training samples whether this model can be scored.

        Raises:
            ValueError: no layer is covered, a pattern names none, or the curvature has too many parameters.
            FloatingPointError: losses are not finite.
        """
        with differentiable(model):
            samples = Samples.of(train)
            plan = _plan(model, samples, task, self.layers)
            one = next(plan.traces(dataclasses.replace(samples, workers=0).at([0])))
            hessian_root(one.outputs, one.targets, plan.task)
        self.curvature.check(sum(parameters_of(model, plan.layers).values()))

    def __call__(
        self,
        model: nn.Module,
        train: Any,
        query: Any,
        task: Task = Task(),
        candidates: Sequence[int] | None = None,
        progress: Progress = quiet,
    ) -> Influence:
        """Score training samples for each query; the model is left as it was.

        Args:
            model: any module; it runs in eval mode, batch normalisation and dropout with it.
            train: training dataset (or a loader, read in dataset order): sample i is `dataset[i]`.
            query: dataset or loader of the samples whose losses are asked about.
            task: how to read batches, call the model, and its loss per sample.
            candidates: places in `train` to score; all when None. n stays the size of `train`.
            progress: shows how far it got.

        Raises:
            ValueError: a dataset is empty, no layer is covered, or the curvature is zero.
            FloatingPointError: gradients or scores are not finite.
        """
        train, query = Samples.of(train), Samples.of(query)
        if not len(train) or not len(query):
            raise ValueError(f"train, query: expected samples in both, got {len(train)} and {len(query)}")
        with differentiable(model):
            plan = _plan(model, train, task, self.layers)
            fitted = self._fit(plan, train, progress)
            damping = _damping(self.damping, fitted)
            asked = _queries(plan, query)
            solved = fitted.solve(asked.gradients, damping)
            chosen = train if candidates is None else train.at(candidates)
            scored = _score(plan, chosen, solved, len(train), progress)
        left_out = _left_out(model, plan.layers)
        return Influence(
            scores=_finite(scored.scores, "scores"),
            train_ids=torch.tensor(chosen.ids),
            train_targets=scored.targets,
            query_targets=asked.targets,
            query_losses=asked.losses,
            method=f"influence function, {self.curvature!r}",
            damping=damping,
            covered=tuple(parameters_of(model, plan.layers)),
            left_out=left_out,
            covered_elements=sum(parameters_of(model, plan.layers).values()),
            gradient_norm=scored.gradient_norm,
            curvature_n=fitted.n,
            notes=_notes(self.damping, len(train), scored.scores, asked),
        )

    def _fit(self, plan: _Plan, train: Samples, progress: Progress) -> Fitted:
        some = train if self.curvature.samples is None else train.spread(self.curvature.samples)
        return self.curvature.fit(partial(plan.watched, some, progress), plan.task)


@dataclass(frozen=True)
class _Plan:
    """What one run of an estimator goes by: the covered layers, and how many samples fit at once."""

    model: nn.Module
    layers: list[str]
    task: Task
    at_once: int

    def traces(self, samples: Samples) -> Iterator[Trace]:
        device = device_of(self.model)
        for batch in samples:
            for start in range(0, size(batch), self.at_once):
                part = to_device(take(batch, start, start + self.at_once), device)
                yield Trace(self.model, self.layers, self.task, part)

    def watched(self, samples: Samples, progress: Progress, what: str) -> Iterator[Trace]:
        parts = -(-samples.batch_size // self.at_once)
        return iter(progress(self.traces(samples), -(-len(samples) // samples.batch_size) * parts, what))


class _Asked(NamedTuple):
    gradients: Gradients
    targets: Tensor
    losses: Tensor
    mixed: bool


class _Scored(NamedTuple):
    scores: Tensor
    targets: Tensor
    gradient_norm: float


def _plan(model: nn.Module, train: Samples, task: Task, patterns: Sequence[str] | None) -> _Plan:
    candidates = layers_of(model)
    if not candidates:
        raise ValueError(f"model: expected linear or convolutional layers that are trained, {_name(model)} has none")
    if patterns is not None:
        asked = match_layers(model, patterns, "InfluenceFunction(layers=...)")
        candidates = [layer for layer in candidates if layer in asked]
    batch = to_device(next(iter(dataclasses.replace(train, workers=0).at(range(min(3, len(train)))))), device_of(model))
    task = settled(task, model, batch, train.spread(SETTLED_BY))
    _finite(Trace(model, [], task, batch).losses, "losses of the first training samples")
    layers = verified_layers(model, candidates, task, batch)
    if not layers:
        raise ValueError(
            f"model: expected a linear or convolutional layer whose gradient reaches the loss, got none of {candidates}"
        )
    rows = Trace(model, layers, task, take(batch, 0, 1))
    per_sample = sum(row.inputs.numel() + row.outputs.numel() for row in rows.rows(rows.losses).values())
    return _Plan(model, layers, task, max(1, min(train.batch_size, ELEMENTS_AT_ONCE // max(1, per_sample))))


def _queries(plan: _Plan, query: Samples) -> _Asked:
    gradients: dict[str, list[Tensor]] = {layer: [] for layer in plan.layers}
    targets, losses, mixed = [], [], False
    for trace in plan.traces(query):
        mixed = is_mixed(trace.outputs, trace.targets, plan.task)
        for layer, rows in trace.rows(trace.losses).items():
            gradients[layer].append(_finite(rows.gradients(), f"query gradients of {layer}"))
        targets.append(trace.targets.detach().cpu())
        losses.append(trace.losses.detach().cpu())
    joined = {layer: torch.cat(parts) for layer, parts in gradients.items()}
    return _Asked(joined, torch.cat(targets), torch.cat(losses), mixed)


def _score(plan: _Plan, train: Samples, solved: Gradients, n: int, progress: Progress) -> _Scored:
    flat = {layer: grads.flatten(1) for layer, grads in solved.items()}
    mean = {layer: torch.zeros_like(grads[0]) for layer, grads in flat.items()}
    any_layer, scores, targets = next(iter(flat.values())), [], []
    for trace in plan.watched(train, progress, "scoring training samples"):
        block = any_layer.new_zeros(len(any_layer), len(trace.losses))
        for layer, rows in trace.rows(trace.losses).items():
            for part, few in rows.blocks():
                grads = few.gradients().flatten(1)
                block[:, part] += flat[layer] @ grads.T
                mean[layer] += grads.sum(0)
        scores.append(block.cpu() / n)
        targets.append(trace.targets.detach().cpu())
    norm = sum(float((total / len(train)).cpu().double().square().sum()) for total in mean.values()) ** 0.5
    return _Scored(torch.cat(scores, dim=1), torch.cat(targets), norm)


def _damping(given: float | None, fitted: Fitted) -> float:
    if given is not None:
        return given
    found = DAMPING_SHARE * fitted.mean_eigenvalue
    if not found > 0:
        raise ValueError("damping: the curvature to take it from is zero (is the softmax saturated?); pass damping=")
    return found


def _left_out(model: nn.Module, layers: Sequence[str]) -> dict[str, int]:
    covered = {id(p) for layer in layers for p in model.get_submodule(layer).parameters(recurse=False)}
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered}


def _finite(values: Tensor, what: str) -> Tensor:
    if not bool(values.isfinite().all()):
        raise FloatingPointError(f"influence: {what} hold NaN or infinity")
    return values.detach()


def _notes(damping: float | None, n: int, scores: Tensor, asked: _Asked) -> tuple[str, ...]:
    notes = []
    if impossible := int((scores < -asked.losses[:, None]).sum()):
        notes.append(f"{impossible} scores predict a loss below zero: read their order, not their size")
    if damping is None:
        notes.append(f"damping was not given: {DAMPING_SHARE} × the mean eigenvalue of the curvature")
    if asked.mixed:
        notes.append(f"many classes: the curvature is estimated from {DRAWS} random mixtures of them per sample")
    if scores.shape[1] < n:
        notes.append(f"{scores.shape[1]:,} of {n:,} training samples were scored; the others are not in the ranking")
    return tuple(notes)


def _name(model: nn.Module) -> str:
    return type(model).__name__
