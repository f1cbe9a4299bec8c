"""Occlusion: what the answer loses where a part of the input is covered."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lightning_interp.attribution.engine.batching import batches_of_variants, of_rows
from lightning_interp.attribution.engine.explained_input import ExplainedInput
from lightning_interp.attribution.engine.target import Score, Target, logit, recorded, select
from lightning_interp.attribution.perturbed.baseline import Baseline, baseline_like
from lightning_interp.attribution.results import Explanation
from lightning_interp.attribution.saliency import suffix
from lightning_interp.checks import check_count
from lightning_interp.data.batch import at_least_float32
from lightning_interp.data.task import Task
from lightning_interp.network.undisturbed import explaining


@dataclass(frozen=True)
class Occlusion:
    """Fall of the target's logit when a window of the input is covered.

    map at a position = mean over the windows that cover it of logit(x) − logit(x with the window at the baseline);
    `(n, H, W)` for images (all channels are covered together), `(n, tokens)` for token ids and `(n, columns)` for
    tables, where each token or column is a window. No gradient is needed. The network is evaluated on inputs unlike
    those it was trained on, and of two parts of which either suffices both get little.

    Reference: Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, 2014.

    Args:
        window: side of the square window, in pixels.
        stride: from one window to the next; the last ones reach over the edge.
        baseline: what covered parts become: a number (of token ids, the mask or padding token), one per channel or
            column, a tensor in the shape of one sample, or a function of the inputs.
        score: what falls: `logit`, `probability`, `log_probability`, or a function like them.
        batch_size: covered copies at a time.
    """

    window: int = 8
    stride: int = 4
    baseline: Baseline = 0.0
    score: Score = logit
    batch_size: int = 64

    def __post_init__(self) -> None:
        for argument in ("window", "stride", "batch_size"):
            check_count("Occlusion", argument, getattr(self, argument))
        if self.stride > self.window:
            raise ValueError(f"Occlusion(stride=...): expected at most the window, {self.window}, got {self.stride}")

    @property
    def name(self) -> str:
        """Tag of the method."""
        return f"Occlusion_{self.window}_{self.stride}" + suffix(self.score)

    def __call__(self, model: nn.Module, inputs: Any, target: Target, task: Task = Task()) -> Explanation:
        """Explain each sample of a batch by itself; the model is left as it was.

        Args:
            model: any module; it runs in eval mode.
            inputs: what `task.outputs(model, ...)` takes, on the model's device.
            target: class per sample `(n,)`, or a function outputs → `(n,)`.
            task: how to call the model.

        Raises:
            ValueError: the target or the baseline does not fit.
        """
        with explaining(model), torch.no_grad():
            explained = ExplainedInput(model, inputs, task)
            covers = torch.stack(list(self._covers(explained.raw)))
            whole = at_least_float32(select(explained.outputs_of(explained.raw.clone()), target, self.score))
            falls = self._falls(explained, covers, whole, target)
        covered = covers.flatten(1).to(falls)
        maps = (falls @ covered / covered.sum(0)).unflatten(1, covers.shape[1:])
        return Explanation(self.name, maps.cpu(), recorded(target, len(maps)))

    def _falls(
        self, explained: ExplainedInput, covers: Tensor, whole: Tensor, target: Target
    ) -> Float[Tensor, "n windows"]:
        raw, empty = explained.raw, baseline_like(self.baseline, explained.raw)
        shape = (covers.shape[1:], (1, *covers.shape[1:]))[raw.ndim > covers.ndim]  # over channels, where there are
        falls = whole.new_zeros(explained.n, len(covers))
        for rows, windows in batches_of_variants(explained.n, len(covers), self.batch_size, target, raw.device):
            covered = torch.where(covers[windows].reshape(-1, *shape), empty[rows], raw[rows])
            scores = select(explained.outputs_of(covered, rows), of_rows(target, rows), self.score)
            falls[rows, windows] = whole[rows] - at_least_float32(scores)
        return falls

    def _covers(self, raw: Tensor) -> Iterator[Bool[Tensor, " *positions"]]:
        """Yield what each window covers."""
        if raw.ndim < 4:
            yield from torch.eye(raw.shape[-1], dtype=torch.bool, device=raw.device)
            return
        size = raw.shape[2:]
        starts = [range(0, max(length - self.window, 0) + self.stride, self.stride) for length in size]
        for corner in itertools.product(*starts):
            cover = torch.zeros(size, dtype=torch.bool, device=raw.device)
            cover[tuple(slice(start, start + self.window) for start in corner)] = True
            if bool(cover.any()):
                yield cover
