"""Localisation: does a map find the annotated object?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_interp.attribution.metrics.mean import MeanOverSamples, SampleSums
from lightning_interp.attribution.metrics.rank_correlation import all_finite
from lightning_interp.checks import check_count
from lightning_interp.data.batch import at_least_float32

NEEDED_OVERLAP = 0.5  # the benchmark's: intersection over union must exceed it
THRESHOLDS = tuple(k / 20 for k in range(20))  # steps of 0.05, so that `update` runs box_overlap 20 times


def boxes_to_masks(boxes: Float[Tensor, "n 4"] | Int[Tensor, "n 4"], size: tuple[int, int]) -> Bool[Tensor, "n h w"]:
    """Return the pixels whose middle is inside each box.

    Args:
        boxes: x0, y0, x1, y1 in pixels, `(n, 4)`; x1 and y1 are the first pixels outside.
        size: height and width of the image.

    Raises:
        ValueError: a box is empty or has another shape.

    >>> boxes_to_masks(torch.tensor([[1, 0, 3, 1]]), (2, 4)).int()
    tensor([[[0, 1, 1, 0],
             [0, 0, 0, 0]]], dtype=torch.int32)
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not bool((boxes[:, 2:] > boxes[:, :2]).all()):
        raise ValueError(f"boxes: expected rows x0, y0, x1, y1 with x0 < x1 and y0 < y1, got {boxes.tolist()}")
    rows, columns = (torch.arange(length, device=boxes.device) + 0.5 for length in size)
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    inside_y, inside_x = (rows > y0) & (rows < y1), (columns > x0) & (columns < x1)
    return inside_y[:, :, None] & inside_x[:, None, :]


def pointing(maps: Float[Tensor, "n *shape"], masks: Bool[Tensor, "n h w"], tolerance: int = 0) -> Float[Tensor, " n"]:
    """Return whether the map's maximum is inside the mask, or within some pixels of it: 1 or 0.

    Where several positions share the maximum, the share of them that hits. A constant map points nowhere: 0. NaN where
    a map is not finite.

    Reference: Zhang et al., Top-down Neural Attention by Excitation Backprop, 2018.

    Args:
        maps: `(n, H, W)`, or `(n, C, H, W)`, of which the largest absolute value over channels is taken.
        masks: where the object is.
        tolerance: distance in pixels that still counts (the paper: 15).

    Raises:
        ValueError: the shapes do not fit, or a mask is empty.
    """
    check_count("pointing", "tolerance", tolerance, least=0)
    maps, masks = _maps_and_masks(maps, masks)
    reach = _grown(masks, tolerance).flatten(1)
    flat = maps.flatten(1)
    at_peak = flat == flat.amax(1, keepdim=True)
    hits = (at_peak & reach).sum(1).double() / at_peak.sum(1)
    return hits.masked_fill(at_peak.all(1), 0).masked_fill(~all_finite(maps), torch.nan)


def energy_inside(maps: Float[Tensor, "n *shape"], masks: Bool[Tensor, "n h w"]) -> Float[Tensor, " n"]:
    """Return the share of the map's positive part that is inside the mask.

    Σ_inside max(map, 0) / Σ max(map, 0); 0 of a map without a positive value, which finds nothing. NaN where a map is
    not finite. A map that is the same everywhere scores the mask's share of the image: compare with `Centre()`.

    Reference: Wang et al., Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks, 2020.

    Args:
        maps: `(n, H, W)`, or `(n, C, H, W)`, of which the largest absolute value over channels is taken.
        masks: where the object is.

    Raises:
        ValueError: the shapes do not fit, or a mask is empty.
    """
    maps, masks = _maps_and_masks(maps, masks)
    positive = maps.double().clamp(min=0)
    whole = positive.sum((1, 2))
    share = (positive * masks).sum((1, 2)) / whole
    return share.masked_fill(whole == 0, 0).masked_fill(~all_finite(maps), torch.nan)


def box_overlap(
    maps: Float[Tensor, "n *shape"], masks: Bool[Tensor, "n h w"], threshold: float = 0.2
) -> Float[Tensor, " n"]:
    """Return intersection over union of the box around a map's highest values and the box around the mask.

    The map's box is around the largest connected component of the positions above `threshold` times the map's maximum;
    corners connect, and of equal ones the one that ends higher up is taken. 0 of a map without a positive value, which
    has no box. NaN where a map is not finite.

    Reference: Zhou et al., Learning Deep Features for Discriminative Localization, 2016.

    Args:
        maps: `(n, H, W)`, or `(n, C, H, W)`, of which the largest absolute value over channels is taken.
        masks: where the object is.
        threshold: share of the map's maximum, 0 up to 1.

    Raises:
        ValueError: the shapes do not fit, a mask is empty, or the threshold is not a share.
    """
    _check_share("box_overlap", "threshold", threshold)
    maps, masks = _maps_and_masks(maps, masks)
    peak = maps.amax((1, 2), keepdim=True)
    above = maps > threshold * peak  # nowhere, where the maximum is not positive
    map_boxes, true = _box(_largest_component(above)), _box(masks)
    overlap = _area(torch.cat([torch.maximum(map_boxes, true)[:, :2], torch.minimum(map_boxes, true)[:, 2:]], dim=1))
    overlaps = overlap / (_area(map_boxes) + _area(true) - overlap)
    return overlaps.masked_fill(~all_finite(maps), torch.nan)


def localization_error(
    maps: Float[Tensor, "n *shape"], masks: Bool[Tensor, "n h w"], threshold: float = 0.2
) -> Float[Tensor, " n"]:
    """Return 1 where `box_overlap` is at most one half, and 0 where it is more; NaN where a map is not finite.

    The class is taken as known.

    Reference: Zhou et al., Learning Deep Features for Discriminative Localization, 2016.
    """
    overlap = box_overlap(maps, masks, threshold)
    return (overlap <= NEEDED_OVERLAP).to(overlap).masked_fill(overlap.isnan(), torch.nan)


class PointingGame(MeanOverSamples):
    """Share of maps whose maximum is inside the mask: the mean of `pointing`.

    Reference: Zhang et al., Top-down Neural Attention by Excitation Backprop, 2018.

    Args:
        tolerance: distance in pixels that still counts.
    """

    higher_is_better = True

    def __init__(self, tolerance: int = 0) -> None:
        check_count("PointingGame", "tolerance", tolerance, least=0)
        super().__init__(tolerance)
        self.tolerance = tolerance

    def update(self, maps: Float[Tensor, "n *shape"], masks: Bool[Tensor, "n h w"]) -> None:
        """Add a batch of maps, `(n, H, W)` or `(n, C, H, W)`, and masks."""
        self.add(pointing(maps, masks, self.tolerance))


class EnergyInside(MeanOverSamples):
    """Mean share of the positive map that is inside the mask: the mean of `energy_inside`.

    Reference: Wang et al., Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks, 2020.
    """

    higher_is_better = True

    def update(self, maps: Float[Tensor, "n *shape"], masks: Bool[Tensor, "n h w"]) -> None:
        """Add a batch of maps, `(n, H, W)` or `(n, C, H, W)`, and masks."""
        self.add(energy_inside(maps, masks))


class LocalizationError(MeanOverSamples):
    """Share of maps whose box misses the object: the mean of `localization_error`.

    Reference: Zhou et al., Learning Deep Features for Discriminative Localization, 2016.

    Args:
        threshold: share of the map's maximum.
    """

    higher_is_better = False

    def __init__(self, threshold: float = 0.2) -> None:
        _check_share("LocalizationError", "threshold", threshold)
        super().__init__(threshold)
        self.threshold = threshold

    def update(self, maps: Float[Tensor, "n *shape"], masks: Bool[Tensor, "n h w"]) -> None:
        """Add a batch of maps, `(n, H, W)` or `(n, C, H, W)`, and masks."""
        self.add(localization_error(maps, masks, self.threshold))


class BestLocalizationError(SampleSums):
    """Smallest `LocalizationError` over thresholds, and the threshold: `{"error": ..., "threshold": ...}`.

    1 − MaxBoxAcc, the threshold a share of the maximum (MaxBoxAcc takes it between minimum and maximum: the same for
    maps with a zero). It distinguishes a map in the wrong place from one at the wrong scale; but the threshold is
    chosen on the samples themselves, which is optimistic, the more so the fewer they are. Of equally good thresholds
    the smallest.

    Reference: Choe et al., Evaluating Weakly Supervised Object Localization Methods Right, 2020.

    Args:
        thresholds: shares of the map's maximum.
    """

    higher_is_better = False

    def __init__(self, thresholds: Sequence[float] = THRESHOLDS) -> None:
        for threshold in thresholds:
            _check_share("BestLocalizationError", "thresholds", threshold)
        if not thresholds:
            raise ValueError("BestLocalizationError(thresholds=...): expected at least one, got none")
        super().__init__(tuple(thresholds), shape=(len(thresholds),))
        self.thresholds = tuple(sorted(thresholds))

    def update(self, maps: Float[Tensor, "n *shape"], masks: Bool[Tensor, "n h w"]) -> None:
        """Add a batch of maps, `(n, H, W)` or `(n, C, H, W)`, and masks."""
        self.add(torch.stack([localization_error(maps, masks, threshold) for threshold in self.thresholds], dim=1))

    def compute(self) -> dict[str, Tensor]:
        """Return the smallest error so far and the threshold that gives it; NaN as soon as one map is not finite."""
        errors = self.mean()
        error, best = errors.min(0)
        threshold = torch.tensor(self.thresholds).to(errors)[best]
        return {"error": error, "threshold": threshold.masked_fill(error.isnan(), torch.nan)}


def _maps_and_masks(maps: Tensor, masks: Tensor) -> tuple[Float[Tensor, "n h w"], Bool[Tensor, "n h w"]]:
    """Return maps without channels, and masks on their device."""
    flat = maps.abs().amax(1) if maps.ndim == 4 else maps
    if flat.ndim != 3 or flat.shape != masks.shape:
        raise ValueError(
            f"maps: expected (n, H, W) or (n, C, H, W) of masks {tuple(masks.shape)}, got {tuple(maps.shape)}"
        )
    if masks.dtype is not torch.bool or not bool(masks.flatten(1).any(1).all()):
        raise ValueError(
            f"masks: expected bool, true somewhere in each, got {masks.dtype} with"
            f" {masks.flatten(1).count_nonzero(1).tolist()} true positions"
        )
    return at_least_float32(flat.detach()), masks.to(maps.device)


def _check_share(owner: str, argument: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{owner}({argument}=...): expected a share from 0, below 1, got {value!r}")


def _grown(masks: Bool[Tensor, "n h w"], tolerance: int) -> Bool[Tensor, "n h w"]:
    """Return the pixels that are within a distance of the mask."""
    if tolerance == 0:
        return masks
    away = torch.arange(-tolerance, tolerance + 1, device=masks.device).square()
    disc = (away[:, None] + away <= tolerance**2).float()
    return F.conv2d(masks[:, None].float(), disc[None, None], padding=tolerance)[:, 0] > 0.5


def _largest_component(above: Bool[Tensor, "n h w"]) -> Bool[Tensor, "n h w"]:
    """Return the largest set of connected positions of each sample; none where there is none.

    Each position takes the largest label among its neighbours, and then the label of the position with that number,
    until all of a component have the same.
    """
    n, height, width = above.shape
    own = torch.arange(1, height * width + 1, device=above.device).view(height, width)
    labels = torch.where(above, own, 0)
    while True:
        spread = F.max_pool2d(labels[:, None].double(), 3, stride=1, padding=1)[:, 0].long() * above
        if torch.equal(spread, labels):
            break
        label_at = F.pad(spread.flatten(1), (1, 0))
        labels = label_at.gather(1, spread.flatten(1)).view_as(labels)
    sizes = torch.zeros(n, height * width + 1, device=above.device).scatter_add_(
        1, labels.flatten(1), above.flatten(1).float()
    )
    return above & (labels == sizes.argmax(1)[:, None, None])


def _box(masks: Bool[Tensor, "n h w"]) -> Float[Tensor, "n 4"]:
    """Return x0, y0, x1, y1 around what is true, x1 and y1 outside; zeros where nothing is."""
    across, down = masks.any(1).int(), masks.any(2).int()
    firsts = [across.argmax(1), down.argmax(1)]
    ends = [line.shape[1] - line.flip(1).argmax(1) for line in (across, down)]
    return torch.stack(firsts + ends, dim=1).double() * masks.flatten(1).any(1, keepdim=True)


def _area(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, " n"]:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
