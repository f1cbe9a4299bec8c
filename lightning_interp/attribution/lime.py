"""LIME: a linear model that approximates the network around one sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn

from lightning_interp.attribution.engine.target import Score, Target, logit, recorded
from lightning_interp.attribution.perturbed.baseline import Baseline
from lightning_interp.attribution.perturbed.coalitions import Draw, bernoulli, distance_to_all
from lightning_interp.attribution.perturbed.linear_models import LocalModel, k_lasso, weighted_ridge
from lightning_interp.attribution.perturbed.local_models import LocalModels, local_models
from lightning_interp.attribution.perturbed.queries import score_coalitions
from lightning_interp.attribution.perturbed.regions import Regions, regions_tag
from lightning_interp.attribution.results import Explanation
from lightning_interp.attribution.saliency import suffix
from lightning_interp.checks import check_count
from lightning_interp.data.task import Task

WIDTH = 0.25  # the default of the paper's reference implementation for images


def locality(coalitions: Bool[Tensor, "draws parts"], width: float) -> Float[Tensor, " draws"]:
    """Return exp(−d² / 2 width²), d the cosine distance to all parts being on; the empty coalition has d = 1."""
    return (-distance_to_all(coalitions).square() / (2 * width**2)).exp()


@dataclass(frozen=True)
class LIME:
    """Coefficients of a linear model of what the network does, near a sample, when parts of it are switched off.

    β, b = argmin Σ_z exp(−d(z)² / σ²) (logit_target(x with just the parts z) − b − zᵀβ)² + ridge · ‖β‖², over drawn
    coalitions z, d the cosine distance to all parts being on, σ² = 2 · width². Each position of a map has its part's
    coefficient: `(n, H, W)` for images, `(n, tokens)` for token ids, `(n, columns)` for tables; signed. No gradient is
    needed. How much of the network's variation the linear model catches is `facts["r2"]`: where it is small, parts
    interact and no map of single parts shows how. The coefficients depend on the parts, on the baseline that replaces
    them, and on the width, whose choice is not clear: see `by_width`. The draws are seeded by the sample itself: the
    same in every batch, epoch and run.

    Reference: Ribeiro et al., "Why should I trust you?" Explaining the predictions of any classifier, 2016.

    Args:
        samples: coalitions drawn per sample.
        parts: sample → the part (a whole number) at each position, below 0 where nothing is ever switched off:
            `Superpixels()`, `Grid()` or a function `(C, H, W)` → `(H, W)`. When None, superpixels of images (a grid
            without scikit-image), each token that counts by `task.mask`, each column of a table.
        width: of the kernel; the paper's σ² is 2 · width².
        baseline: what replaces a part that is off: a number (of token ids, the mask or padding token), one per channel
            or column (of tables, say, the training set's mean), a tensor in the shape of one sample, or a function of
            the inputs.
        ridge: penalty on the squares; not in use with `features`.
        features: at most this many parts get a coefficient, chosen by the lasso's path (scikit-learn) and fitted by
            weighted least squares; all when None.
        draw: (parts, draws, generator) → coalitions: `bernoulli`, or `any_size` as in the paper.
        score: what is explained: `logit`, `probability`, `log_probability`, or a function like them.
        batch_size: perturbed copies at a time.
    """

    samples: int = 1000
    parts: Regions | None = None
    width: float = WIDTH
    baseline: Baseline = 0.0
    ridge: float = 1.0
    features: int | None = None
    draw: Draw = bernoulli
    score: Score = logit
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_count("LIME", "samples", self.samples, 2)
        check_count("LIME", "batch_size", self.batch_size)
        if self.features is not None:
            check_count("LIME", "features", self.features)
        if not self.width > 0:
            raise ValueError(f"LIME(width=...): expected a positive distance, got {self.width!r}")
        if not self.ridge >= 0:
            raise ValueError(f"LIME(ridge=...): expected a penalty of at least 0, got {self.ridge!r}")

    @property
    def name(self) -> str:
        """Tag of the method."""
        sparse = "" if self.features is None else f"_{self.features}_features"
        width = "" if self.width == WIDTH else f"_width_{self.width:g}"
        return f"LIME{sparse}{width}" + suffix(self.score) + regions_tag(self.parts)

    def __call__(self, model: nn.Module, inputs: Any, target: Target, task: Task = Task()) -> Explanation:
        """Explain each sample of a batch by itself; the model is left as it was.

        Args:
            model: any module; it runs in eval mode.
            inputs: what `task.outputs(model, ...)` takes, on the model's device.
            target: class per sample `(n,)`, or a function outputs → `(n,)`.
            task: how to call the model.

        Raises:
            ValueError: the target, the parts or the baseline do not fit.
        """
        scored = score_coalitions(self, model, inputs, target, task)
        return local_models(self, scored).of_target(recorded(target, len(scored.labels)))

    def all_classes(self, model: nn.Module, inputs: Any, task: Task = Task()) -> LocalModels:
        """Fit the models of every class to one set of forwards; `.of(target)` gives the maps of a class per sample."""
        return local_models(self, score_coalitions(self, model, inputs, None, task))

    def coalitions(self, n_parts: int, generator: Generator) -> Tensor:
        """Return which parts are on, `(samples, parts)`."""
        return self.draw(n_parts, self.samples, generator)

    def fit(self, coalitions: Tensor, scores: Tensor) -> LocalModel:
        """Return one sample's linear model of each column of scores."""
        weights = locality(coalitions, self.width)
        if self.features is not None:
            return k_lasso(coalitions, scores, weights, self.features)
        return weighted_ridge(coalitions, scores, weights, self.ridge)


def by_width(
    lime: LIME, model: nn.Module, inputs: Any, target: Target, widths: Sequence[float], task: Task = Task()
) -> tuple[Explanation, ...]:
    """Return the explanation at each width of the kernel, all from one set of forwards.

    Where maps and R² change much from width to width, "near the sample" has no single meaning.

    Args:
        lime: the method; its own width does not matter.
        model: any module; it runs in eval mode.
        inputs: what `task.outputs(model, ...)` takes, on the model's device.
        target: class per sample `(n,)`, or a function outputs → `(n,)`.
        widths: of the kernel.
        task: how to call the model.
    """
    methods = [replace(lime, width=width) for width in widths]
    scored = score_coalitions(lime, model, inputs, target, task)
    return tuple(local_models(method, scored).of_target(recorded(target, len(scored.labels))) for method in methods)
