"""Scores of coalitions: a model evaluated on samples with some of their parts switched off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_interp.attribution.engine.batching import batches_of_variants, of_rows
from lightning_interp.attribution.engine.explained_input import ExplainedInput
from lightning_interp.attribution.engine.target import Score, Target, logit, per_class, select
from lightning_interp.attribution.perturbed.baseline import Baseline, baseline_like
from lightning_interp.attribution.perturbed.linear_models import LocalModel
from lightning_interp.attribution.perturbed.regions import Regions, default_regions, regions_of
from lightning_interp.data.batch import at_least_float32
from lightning_interp.data.task import Task
from lightning_interp.network.undisturbed import explaining


@runtime_checkable
class CoalitionMethod(Protocol):
    """What LIME and KernelSHAP have in common: an input's parts are switched off, and a linear model is fitted."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def parts(self) -> Regions | None: ...  # noqa: D102
    @property
    def baseline(self) -> Baseline: ...  # noqa: D102
    @property
    def score(self) -> Score: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102

    def coalitions(self, n_parts: int, generator: Generator) -> Tensor:
        """Return which parts are on, `(draws, parts)`."""

    def fit(self, coalitions: Tensor, scores: Tensor) -> LocalModel:
        """Return the linear model of one sample."""


@dataclass(frozen=True, eq=False)
class CoalitionScores:
    """Each sample's coalitions, and the model's scores of the sample with just these parts.

    Args:
        regions: sample → the part at each position.
        labels: the part at each position, −1 where nothing is ever switched off, `(n, *positions)`.
        coalitions: which parts are on, `(draws, parts)` per sample: numbers of parts may differ between samples.
        scores: of each draw, `(draws, outputs)` per sample: one output where there is a target, else one per class.
    """

    regions: Regions
    labels: Int[Tensor, "n *positions"]
    coalitions: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]


def score_coalitions(
    method: CoalitionMethod, model: nn.Module, inputs: Any, target: Target | None, task: Task
) -> CoalitionScores:
    """Draw coalitions of each sample's parts, seeded by the sample, and evaluate the model on all of them.

    Args:
        method: the parts, the baseline that replaces them, and which coalitions are drawn.
        model: any module; it runs in eval mode.
        inputs: what `task.outputs(model, ...)` takes.
        target: class per sample, a function of the outputs, or None for every class.
        task: how to call the model.
    """
    with explaining(model), torch.no_grad():
        explained = ExplainedInput(model, inputs, task)
        regions = method.parts or default_regions(explained.raw)
        labels = regions_of(explained, regions)
        counts = [int(sample.max()) + 1 for sample in labels]
        generators = [Generator().manual_seed(seed) for seed in explained.seeds()]
        coalitions = [_check_coalitions(method.coalitions(*of), of[0]) for of in zip(counts, generators, strict=True)]
        scores = _scores(explained, method, labels, coalitions, target)
    return CoalitionScores(regions, labels, tuple(coalitions), scores)


def every_class(outputs: Tensor, score: Score) -> Float[Tensor, "n classes"]:
    """Return the score of every class; of a single logit, of classes 0 and 1."""
    logits = per_class(outputs)
    if score is logit and logits.shape[1] > 1:
        return logits
    labels = logits.new_zeros(len(logits), dtype=torch.long)
    return torch.stack([score(logits, labels + label) for label in range(max(2, logits.shape[1]))], 1)


def _scores(
    explained: ExplainedInput,
    method: CoalitionMethod,
    labels: Tensor,
    coalitions: Sequence[Tensor],
    target: Target | None,
) -> tuple[Tensor, ...]:
    raw, empty = explained.raw, baseline_like(method.baseline, explained.raw)
    on, draws = _padded(coalitions).to(raw.device), [len(masks) for masks in coalitions]
    columns = (labels.flatten(1) % on.shape[2]).to(raw.device)  # label −1 becomes the last column, which is always on
    which = explained.everything if target is None else target
    scores: Tensor | None = None  # how many outputs there are is known after the first batch
    for rows, variants in _batches_of_draws(draws, method.batch_size, which, raw.device):
        switched_on = on[rows, variants].gather(1, columns[rows]).unflatten(1, labels.shape[1:])
        copies = torch.where(switched_on[:, None] if raw.ndim > 2 else switched_on, raw[rows], empty[rows])
        outputs = explained.outputs_of(copies, rows)
        of_batch = None if target is None else of_rows(target, rows)
        values = at_least_float32(_score_outputs(outputs, of_batch, method.score))
        if scores is None:
            scores = values.new_zeros(*on.shape[:2], values.shape[1])
        scores[rows, variants] = values
    return () if scores is None else tuple(of[:count] for of, count in zip(scores.cpu(), draws, strict=True))


def _score_outputs(outputs: Tensor, target: Target | None, score: Score) -> Float[Tensor, "m outputs"]:
    return every_class(outputs, score) if target is None else select(outputs, target, score)[:, None]


def _batches_of_draws(
    draws: Sequence[int], batch_size: int, target: Target, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (sample, draw) pairs as `batches_of_variants`, skipping those beyond a sample's own number of draws.

    Where all samples come together, such a draw is evaluated nevertheless, with all parts on.
    """
    counts = torch.tensor(draws, device=device)
    for rows, variants in batches_of_variants(len(draws), max(draws), batch_size, target, device):
        real = variants < counts[rows]
        if callable(target) or min(draws) == max(draws):
            yield rows, variants
        elif bool(real.any()):
            yield rows[real], variants[real]


def _padded(coalitions: Sequence[Tensor]) -> Bool[Tensor, "n draws parts"]:
    """Return coalitions in one tensor, padded with parts that are on, and one more part that is always on."""
    n_parts = max(sample.shape[1] for sample in coalitions)
    off = [nn.functional.pad(~sample, (0, n_parts + 1 - sample.shape[1])) for sample in coalitions]
    return ~pad_sequence(off, batch_first=True)


def _check_coalitions(coalitions: Tensor, n_parts: int) -> Tensor:
    fits = coalitions.ndim == 2 and len(coalitions) and coalitions.shape[1] == n_parts
    if coalitions.dtype is not torch.bool or not fits:
        raise ValueError(
            f"draw: expected booleans (draws, {n_parts}), got {tuple(coalitions.shape)} of {coalitions.dtype}"
        )
    return coalitions
