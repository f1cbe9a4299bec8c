"""Attribution maps of a run's moments on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from lightning_interp.attribution.results import MapSnapshot
from lightning_interp.storage.step_store import FORMAT, StepStore


class MapStore(StepStore[MapSnapshot]):
    """A run's maps in half precision, each scaled to 1, their scales in the manifest: exact to 0.05% of the largest."""

    prefix: ClassVar[str] = "maps"

    def packed(self, record: MapSnapshot) -> tuple[bytes, dict[str, Any]]:
        """Return a moment's file, and the scale of each sample's map."""
        held, scales = {}, {}
        for method, maps in record.maps.items():
            scale = _scale(maps)
            held[method] = (maps / scale.reshape(-1, *[1] * (maps.ndim - 1))).half().contiguous()
            scales[method] = scale.tolist()
        return save(held, {"format": str(FORMAT)}), {"scales": scales}

    def unpacked(self, entry: Mapping[str, Any]) -> MapSnapshot:
        """Return a moment's maps."""
        held = load(self.folder.read(entry["file"]))
        maps = {
            method: held[method].float() * torch.tensor(scale).reshape(-1, *[1] * (held[method].ndim - 1))
            for method, scale in entry["scales"].items()
        }
        return MapSnapshot(entry["epoch"], entry["step"], maps)


def _scale(maps: Tensor) -> Tensor:
    """Return each sample's largest absolute value, 1 where there is none but zeros, or what is not finite."""
    largest = maps.flatten(1).abs().amax(1).double()
    return torch.where(largest.isfinite() & (largest > 0), largest, torch.ones_like(largest))
