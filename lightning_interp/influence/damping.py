"""Damping: what is added to the curvature's diagonal before it is inverted, weight decay included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_interp.influence.gradients.coverage import Coverage


@dataclass(frozen=True)
class Damping:
    """The total λ of each parameter, and where it comes from.

    Args:
        values: one number for all, or parameter name → a number, or a tensor of its shape.
        origin: in words, for the report.
    """

    values: float | Mapping[str, float | Tensor]
    origin: str

    def on(self, parameter: str) -> float | Tensor:
        """Return the λ of a parameter.

        Raises:
            ValueError: there is none for it.
        """
        if not isinstance(self.values, Mapping):
            return self.values
        if parameter not in self.values:
            raise ValueError(
                f"damping: expected one for {parameter!r}, got those of {', '.join(self.values) or 'none'}"
            )
        return self.values[parameter]

    @property
    def typical(self) -> float:
        """The λ itself, or the median over all elements where it differs."""
        if not isinstance(self.values, Mapping):
            return self.values
        parts = [torch.as_tensor(value, dtype=torch.float64).flatten() for value in self.values.values()]
        return float(torch.cat(parts).median())

    def shift(self, coverage: Coverage) -> dict[str, float | Tensor]:
        """Return λ per block: a number where it is the same throughout, else `(groups, o, i)`."""
        held = dict(coverage.model.named_parameters())
        found: dict[str, float | Tensor] = {}
        for name, block in coverage.blocks.items():
            values = {parameter: self.on(parameter) for parameter in block.parameters}
            numbers = {value for value in values.values() if not isinstance(value, Tensor)}
            if len(numbers) == 1 and not any(isinstance(value, Tensor) for value in values.values()):
                found[name] = numbers.pop()
            else:
                spread = {
                    parameter: value.to(held[parameter])
                    if isinstance(value, Tensor)
                    else torch.full_like(held[parameter], value)
                    for parameter, value in values.items()
                }
                found[name] = block.pack(spread).detach()
        return found
