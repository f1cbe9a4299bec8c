"""Attribution maps on disk, one file for each evaluation during a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from lightning_interp.attribution.results import MapSnapshot
from lightning_interp.storage.step_store import FORMAT, StepStore


class MapStore(StepStore[MapSnapshot]):
    """A run's maps in half precision, each divided by its largest absolute value, which the manifest keeps.

    Half precision keeps 11 bits, so that values are exact to 0.05% of a map's largest.
    """

    prefix: ClassVar[str] = "maps"

    def packed(self, record: MapSnapshot) -> tuple[bytes, dict[str, Any]]:
        """Return the content of a file, and the scale of each sample's map."""
        scaled_maps, scales = {}, {}
        for method, maps in record.maps.items():
            scale = _largest_values(maps)
            scaled_maps[method] = (maps / scale.reshape(-1, *[1] * (maps.ndim - 1))).half().contiguous()
            scales[method] = scale.tolist()
        return save(scaled_maps, {"format": str(FORMAT)}), {"scales": scales}

    def unpacked(self, entry: Mapping[str, Any]) -> MapSnapshot:
        """Return the maps that an entry of the manifest lists."""
        scaled_maps = load(self.folder.read(entry["file"]))
        maps = {
            method: scaled_maps[method].float() * torch.tensor(scale).reshape(-1, *[1] * (scaled_maps[method].ndim - 1))
            for method, scale in entry["scales"].items()
        }
        return MapSnapshot(entry["epoch"], entry["step"], maps)


def _largest_values(maps: Tensor) -> Tensor:
    """Return each map's largest absolute value; 1 where that is zero or not finite, which cannot divide."""
    largest = maps.flatten(1).abs().amax(1).double()
    return torch.where(largest.isfinite() & (largest > 0), largest, torch.ones_like(largest))
