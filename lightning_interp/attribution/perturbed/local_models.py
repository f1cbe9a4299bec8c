"""Linear models that approximate a network around each sample of a batch, and their maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from lightning_interp.attribution.perturbed.linear_models import LocalModel
from lightning_interp.attribution.perturbed.queries import CoalitionMethod, CoalitionScores
from lightning_interp.attribution.perturbed.regions import regions_tag
from lightning_interp.attribution.results import Explanation


@dataclass(frozen=True, eq=False)
class LocalModels:
    """Linear models that approximate the network around each sample, one per class.

    Args:
        method: tag of the method that fitted them.
        labels: the part at each position, −1 where it has none, `(n, *positions)`.
        models: per sample, with one output per class.
        dtype: of the maps.
    """

    method: str
    labels: Int[Tensor, "n *positions"]
    models: tuple[LocalModel, ...]
    dtype: torch.dtype

    def of(self, target: Int[Tensor, " n"]) -> Explanation:
        """Return the maps of the given class per sample, `(n, *positions)`: each position has its part's coefficient.

        Raises:
            ValueError: there is no such class.
        """
        n, classes = len(self.models), len(self.models[0].r2)
        whole = target.shape == (n,) and not target.is_floating_point()
        if not whole or not all(0 <= label < classes for label in target.tolist()):
            raise ValueError(f"target: expected {n} classes among 0 to {classes - 1}, got {target.tolist()}")
        return self._painted(target.tolist(), target.detach().cpu().long())

    def of_target(self, recorded: Int[Tensor, " n"]) -> Explanation:
        """Return the maps of models that were fitted to one target alone."""
        return self._painted([0] * len(self.models), recorded)

    def _painted(self, outputs: Sequence[int], target: Tensor) -> Explanation:
        maps = torch.zeros(self.labels.shape, dtype=self.dtype)
        r2 = torch.zeros(len(outputs))
        for row, (model, output) in enumerate(zip(self.models, outputs, strict=True)):
            # One more for the label −1.
            values = torch.cat([model.coefficients[:, output], torch.zeros(1)])
            maps[row] = values[self.labels[row]].to(self.dtype)
            r2[row] = model.r2[output]
        n_parts = torch.tensor([float(len(model.coefficients)) for model in self.models])
        return Explanation(self.method, maps, target, facts={"r2": r2, "parts": n_parts})


def local_models(method: CoalitionMethod, scored: CoalitionScores) -> LocalModels:
    """Fit each sample's linear models."""
    samples = zip(scored.coalitions, scored.scores, strict=True)
    models = tuple(method.fit(coalitions, scores) for coalitions, scores in samples)
    name = method.name + ("" if method.parts else regions_tag(scored.regions))
    return LocalModels(name, scored.labels, models, scored.scores[0].dtype)
