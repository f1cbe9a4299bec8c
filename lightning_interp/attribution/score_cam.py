"""Score-CAM: a class activation map weighted by the scores of inputs masked with each channel, without gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.attribution.cam import check_layer, tagged, weighted_sum, with_positions
from lightning_interp.attribution.engine.batching import batches_of_variants, of_rows
from lightning_interp.attribution.engine.forward_backward import LAST_MAP, PassResult
from lightning_interp.attribution.engine.last_map import at_inputs_size
from lightning_interp.attribution.engine.single_pass import SinglePass
from lightning_interp.attribution.engine.target import OfTarget, Score, probability, select
from lightning_interp.attribution.saliency import suffix
from lightning_interp.checks import check_count
from lightning_interp.data.batch import at_least_float32


@dataclass(frozen=True)
class ScoreCAM(SinglePass):
    """Class activation map whose weights are the scores of the input seen through each channel's map.

    map = ReLU(Σ_k w_k A_k), w = softmax over k of score_target(x ⊙ H_k), A the layer's output and H_k = (U_k − min U_k)
    / (max U_k − min U_k) with U_k the map A_k upsampled to the input's size. Upsampled bilinearly; `(n, H, W)` for
    images. The paper's increase of confidence is score(x ⊙ H_k) − score(x′), x′ a baseline: the same number for every
    channel, which a softmax over channels does not see, so that no baseline is needed. It takes one forward per sample
    and channel; the gradient only finds the layer where none is named. A constant A_k has H_k = 0. Probabilities lie
    between 0 and 1, so the softmax leaves all weights within a factor of e of each other: the map is close to the mean
    over channels unless `score=logit`. Where H_k is small the input is near 0, which need not mean that it is empty.

    Reference: Wang et al., Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks, 2020.

    Args:
        layer: name of the layer, as in `named_modules`; when None, the one that `GradCAM` takes.
        score: of the masked input: `probability`, `logit`, `log_probability`, or a function like them.
        batch_size: masked copies at a time.
    """

    layer: str | None = None
    score: Score = probability
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_layer("ScoreCAM", self.layer)
        check_count("ScoreCAM", "batch_size", self.batch_size)

    @property
    def name(self) -> str:
        """Tag of the method."""
        return tagged("ScoreCAM", self.layer) + suffix(self.score, probability)

    @property
    def goal(self) -> OfTarget:
        """What is differentiated, to find the last map: the target's logit, as for `GradCAM`."""
        return OfTarget()

    @property
    def at(self) -> str:
        """Where: at the layer."""
        return self.layer or LAST_MAP

    def read(self, result: PassResult, layer: str) -> Tensor:
        """Return the map after its ReLU, at the input's size.

        Raises:
            ValueError: token ids are explained, which cannot be masked by a product, or the layer gives no map.
        """
        if result.explained.tokens:
            raise ValueError("ScoreCAM: expected inputs of floats, which a map can mask, got token ids; use GradCAM()")
        activations = at_least_float32(with_positions(result.layers[layer], layer).activations)
        with torch.no_grad():
            weights = self._masked_scores(result, activations, layer).softmax(1)
        return at_inputs_size(weighted_sum(activations, weights).relu(), result.explained.raw, layer)

    def _masked_scores(
        self, result: PassResult, activations: Float[Tensor, "n c *positions"], layer: str
    ) -> Float[Tensor, "n c"]:
        explained, raw = result.explained, result.explained.raw
        n, channels = activations.shape[:2]
        scores = activations.new_zeros(n, channels)
        for rows, variants in batches_of_variants(n, channels, self.batch_size, result.target, raw.device):
            masks = _scaled_to_one(at_inputs_size(activations[rows, variants], raw[rows], layer))
            masked = raw[rows] * _over_features(masks, raw).to(raw.dtype)
            outputs = explained.outputs_of(masked, rows)
            scores[rows, variants] = select(outputs, of_rows(result.target, rows), self.score).to(scores.dtype)
        return scores


def _scaled_to_one(maps: Float[Tensor, "m *size"]) -> Float[Tensor, "m *size"]:
    """Return each map less its minimum, over its range; 0 where it is constant."""
    flat = maps.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    spread = torch.where(high == low, torch.ones_like(high), high - low)
    return ((flat - low) / spread).view_as(maps)


def _over_features(masks: Float[Tensor, "m *size"], raw: Tensor) -> Float[Tensor, "m *broadcastable"]:
    """Return masks in a shape that broadcasts over an input: over channels of images, over dimensions of sequences."""
    if masks.ndim == raw.ndim:
        return masks
    return masks.unsqueeze(1 if masks.shape[1:] == raw.shape[2:] else 2)
