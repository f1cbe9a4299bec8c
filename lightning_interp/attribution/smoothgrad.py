"""SmoothGrad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_interp.attribution.engine.batching import batches_of_variants, of_rows
from lightning_interp.attribution.engine.explained_input import ExplainedInput, gradients
from lightning_interp.attribution.engine.target import Score, Target, logit, recorded, select
from lightning_interp.attribution.results import Explanation
from lightning_interp.attribution.saliency import suffix
from lightning_interp.checks import check_count
from lightning_interp.data.batch import at_least_float32
from lightning_interp.data.task import Task
from lightning_interp.network.undisturbed import explaining


@dataclass(frozen=True)
class SmoothGrad:
    """Mean gradient of noisy copies of the input.

    map = mean over draws of ∂ logit_target / ∂x at x + σ ε, ε standard normal, σ = noise · (max x − min x) of that
    sample; signed, in the shape of x; for token ids of their embeddings, the norm over dimensions, `(n, tokens)`. Less
    noisy than the gradient; it is the gradient of the network blurred by that much. The draws are seeded by
    the sample itself: the same in every batch, epoch and run.

    Reference: Smilkov et al., SmoothGrad: removing noise by adding noise, 2017.

    Args:
        draws: noisy copies.
        noise: σ as a share of the sample's range.
        score: what is differentiated: `logit`, `probability`, `log_probability`, or a function like them.
        batch_size: copies at a time.
    """

    draws: int = 25
    noise: float = 0.15
    score: Score = logit
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_count("SmoothGrad", "draws", self.draws)
        check_count("SmoothGrad", "batch_size", self.batch_size)
        if not self.noise > 0:
            raise ValueError(f"SmoothGrad(noise=...): expected a positive share of the range, got {self.noise!r}")

    @property
    def name(self) -> str:
        """Tag of the method."""
        return "SmoothGrad" + ("" if self.draws == 25 else f"_{self.draws}_draws") + suffix(self.score)

    def __call__(self, model: nn.Module, inputs: Any, target: Target, task: Task = Task()) -> Explanation:
        """Explain each sample of a batch by itself; the model is left as it was.

        Args:
            model: any module; it runs in eval mode.
            inputs: what `task.outputs(model, ...)` takes, on the model's device.
            target: class per sample `(n,)`, or a function outputs → `(n,)`.
            task: how to call the model.

        Raises:
            ValueError: the target does not fit, or no gradient flows.
        """
        with explaining(model):
            explained = ExplainedInput(model, inputs, task)
            values, seeds = explained.values, explained.seeds()
            flat = values.flatten(1)
            sigma = self.noise * (flat.amax(1) - flat.amin(1))
            total = torch.zeros_like(at_least_float32(values))
            for rows, draws in batches_of_variants(explained.n, self.draws, self.batch_size, target, values.device):
                pairs = zip(rows.tolist(), draws.tolist(), strict=True)
                noise = torch.stack([_normal(seeds[row] + draw, values[row]) for row, draw in pairs])
                scale = sigma[rows].reshape(-1, *[1] * (values.ndim - 1))
                point = (values[rows] + scale * noise.to(values)).requires_grad_()
                scores = select(explained.outputs(point.clone(), rows), of_rows(target, rows), self.score)
                (gradient,) = gradients(scores, [point])
                total.index_add_(0, rows, gradient.to(total.dtype))
            maps = total / self.draws
        maps = maps.norm(dim=-1) if explained.tokens else maps
        return Explanation(self.name, maps.cpu(), recorded(target, len(maps)), ranked_by="size")


def _normal(seed: int, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
