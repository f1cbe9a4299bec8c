"""What a model says of samples with some of their parts switched off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_interp.attribution.baseline import Baseline, baseline_like
from lightning_interp.attribution.chunks import chunks, of_rows
from lightning_interp.attribution.explained import Explained
from lightning_interp.attribution.local_model import LocalModel
from lightning_interp.attribution.parts import Parts, fitting, parts_of, parts_tag
from lightning_interp.attribution.target import Score, Target, logit, per_class, select
from lightning_interp.batch import precise
from lightning_interp.capture import explaining
from lightning_interp.records import Explanation
from lightning_interp.task import Task


class Method(Protocol):
    """What LIME and KernelSHAP have in common: an input's parts are switched off, and a linear model is fitted."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def parts(self) -> Parts | None: ...  # noqa: D102
    @property
    def baseline(self) -> Baseline: ...  # noqa: D102
    @property
    def score(self) -> Score: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102

    def coalitions(self, parts: int, generator: Generator) -> Tensor:
        """Return which parts are on, `(draws, parts)`."""

    def fit(self, coalitions: Tensor, scores: Tensor) -> LocalModel:
        """Return the linear model of one sample."""


@dataclass(frozen=True, eq=False)
class Switched:
    """Each sample's coalitions, and what a model says of the sample with just these parts.

    Args:
        parts: sample → the part at each position.
        labels: the part at each position, −1 where nothing is ever switched off, `(n, *positions)`.
        coalitions: which parts are on, `(draws, parts)` per sample: samples may have unlike numbers of parts.
        scores: of each draw, `(draws, outputs)` per sample: one output where a target was asked for, else one per
            class.
    """

    parts: Parts
    labels: Int[Tensor, "n *positions"]
    coalitions: tuple[Bool[Tensor, "draws parts"], ...]
    scores: tuple[Float[Tensor, "draws outputs"], ...]


@dataclass(frozen=True, eq=False)
class LocalModels:
    """Linear models that stand for the network around each sample, one per class.

    Args:
        method: tag of what fitted them.
        labels: the part at each position, −1 where it has none, `(n, *positions)`.
        models: per sample, with one output per class.
        dtype: of the maps.
    """

    method: str
    labels: Int[Tensor, "n *positions"]
    models: tuple[LocalModel, ...]
    dtype: torch.dtype = torch.float32

    def of(self, target: Int[Tensor, " n"]) -> Explanation:
        """Return the maps of the given class per sample, `(n, *positions)`: each position has its part's coefficient.

        Raises:
            ValueError: there is no such class.
        """
        classes = [] if not self.models else list(range(len(self.models[0].r2)))
        if target.shape != (len(self.models),) or not all(c in classes for c in target.tolist()):
            raise ValueError(
                f"target: expected {len(self.models)} classes among 0 to {len(classes) - 1}, got {target.tolist()}"
            )
        return self._painted(target.tolist(), target.detach().cpu().long())

    def of_target(self, recorded: Int[Tensor, " n"]) -> Explanation:
        """Return the maps of models that were fitted to one target alone."""
        return self._painted([0] * len(self.models), recorded)

    def _painted(self, outputs: Sequence[int], target: Tensor) -> Explanation:
        maps = torch.zeros(self.labels.shape, dtype=self.dtype)
        r2 = torch.zeros(len(outputs))
        for place, (model, output) in enumerate(zip(self.models, outputs, strict=True)):
            # One more for the label −1.
            values = torch.cat([model.coefficients[:, output], torch.zeros(1)])
            maps[place] = values[self.labels[place]].to(self.dtype)
            r2[place] = model.r2[output]
        parts = torch.tensor([float(len(model.coefficients)) for model in self.models])
        return Explanation(self.method, maps, target, facts={"r2": r2, "parts": parts})


def switched(method: Method, model: nn.Module, inputs: Any, target: Target | None, task: Task) -> Switched:
    """Draw coalitions of each sample's parts, seeded by the sample, and ask the model about all of them.

    Args:
        method: what the parts are, what stands for "off" and which coalitions are asked about.
        model: any module; it runs in eval mode.
        inputs: what `task.outputs(model, ...)` takes.
        target: class per sample, a function of the outputs, or None for every class.
        task: how to call the model.
    """
    with explaining(model), torch.no_grad():
        explained = Explained(model, inputs, task)
        parts = method.parts or fitting(explained.raw)
        labels = parts_of(explained, parts)
        counts = [int(sample.max()) + 1 for sample in labels]
        generators = [Generator().manual_seed(seed) for seed in explained.seeds()]
        drawn = [_checked(method.coalitions(*of), of[0]) for of in zip(counts, generators, strict=True)]
        scores = _scores(explained, method, labels, drawn, target)
    return Switched(parts, labels, tuple(drawn), scores)


def local_models(method: Method, asked: Switched) -> LocalModels:
    """Fit each sample's linear models."""
    models = tuple(method.fit(*drawn) for drawn in zip(asked.coalitions, asked.scores, strict=True))
    name = method.name + ("" if method.parts else parts_tag(asked.parts))
    return LocalModels(name, asked.labels, models, asked.scores[0].dtype if asked.scores else torch.float32)


def every_class(outputs: Tensor, score: Score) -> Float[Tensor, "n classes"]:
    """Return the score of every class; of a single logit, of classes 0 and 1."""
    logits = per_class(outputs)
    if score is logit and logits.shape[1] > 1:
        return logits
    labels = logits.new_zeros(len(logits), dtype=torch.long)
    return torch.stack([score(logits, labels + label) for label in range(max(2, logits.shape[1]))], 1)


def _scores(
    explained: Explained, method: Method, labels: Tensor, drawn: Sequence[Tensor], target: Target | None
) -> tuple[Tensor, ...]:
    raw, empty = explained.raw, baseline_like(method.baseline, explained.raw)
    on, draws = _padded(drawn).to(raw.device), torch.tensor([len(masks) for masks in drawn], device=raw.device)
    places = (labels.flatten(1) % on.shape[2]).to(raw.device)  # label −1 becomes the last column, which is always on
    which = explained.everything if target is None else target
    found: list[Tensor] = []
    for rows, variants in _asked_for(draws, method.batch_size, which):
        kept = on[rows, variants].gather(1, places[rows]).unflatten(1, labels.shape[1:])
        copies = torch.where(kept[:, None] if raw.ndim > 2 else kept, raw[rows], empty[rows])
        outputs = explained.outputs_of(copies, rows)
        asked = select(outputs, of_rows(target, rows), method.score)[:, None] if target is not None else None
        values = precise(every_class(outputs, method.score) if asked is None else asked)
        found = found or [values.new_zeros(*on.shape[:2], values.shape[1])]
        found[0][rows, variants] = values
    together = found[0].cpu() if found else torch.zeros(len(drawn), 0, 1)
    return tuple(scores[: len(masks)] for scores, masks in zip(together, drawn, strict=True))


def _asked_for(draws: Tensor, batch_size: int, target: Target) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (sample, draw) pairs as `chunks` does, without those that a sample does not have.

    Where all samples go together, such a draw is asked for all the same: everything is on in it.
    """
    for rows, variants in chunks(len(draws), max(draws.tolist(), default=0), batch_size, target, draws.device):
        real = torch.full_like(rows, True, dtype=torch.bool) if callable(target) else variants < draws[rows]
        if bool(real.any()):
            yield rows[real], variants[real]


def _padded(coalitions: Sequence[Tensor]) -> Bool[Tensor, "n draws parts"]:
    """Return coalitions in one tensor, where what is missing counts as on, with one more part that is always on."""
    most = max((drawn.shape[1] for drawn in coalitions), default=0)
    off = [nn.functional.pad(~drawn, (0, most + 1 - drawn.shape[1])) for drawn in coalitions]
    return ~pad_sequence(off, batch_first=True)


def _checked(coalitions: Tensor, parts: int) -> Tensor:
    if coalitions.dtype is not torch.bool or coalitions.ndim != 2 or coalitions.shape[1] != parts:
        raise ValueError(
            f"draw: expected booleans (draws, {parts}), got {tuple(coalitions.shape)} of {coalitions.dtype}"
        )
    return coalitions
