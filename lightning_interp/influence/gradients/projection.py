"""Random projection of factored gradients to a few numbers that keep their dot products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple
from zlib import crc32

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_interp.influence.gradients.factored import LARGEST_CHUNK, FactoredGradients, Lookup

BINS_COST = 3  # what a bin of a Fourier transform costs, in elements of a gradient that is written out


@dataclass(frozen=True)
class Projection:
    """Per-sample gradients as `dim` numbers each: φ(g)·φ(g′) is g·g′ in the mean, with an error of about 1/√dim.

    Entry (o, i) of a block's gradient is added, with the sign s(o) s′(i), to bin h(o) + h′(i) mod dim; all blocks
    share the bins. So the projection of an outer product g aᵀ is a circular convolution of those of g and a, and
    neither the gradient nor a matrix (parameters × dim) is written out where a layer is large: dim log dim operations
    per position instead. The hashes follow from the seed and the block's name alone: all samples and processes share
    them.

    Reference: Pham & Pagh, Fast and Scalable Polynomial Kernels via Explicit Feature Maps, 2013.

    Args:
        dim: numbers per gradient.
        seed: of the hashes.
        half: 1 or -1 for one of two projections to half as many numbers, of which the full one is the mean; None for
            the full one.

    >>> gradients = {"fc": FactoredGradients(torch.ones(2, 1, 1, 3), torch.ones(2, 1, 1, 5))}
    >>> Projection(8)(gradients).shape
    torch.Size([2, 8])
    """

    dim: int = 512
    seed: int = 0
    half: Literal[1, -1] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dim, int) or self.dim < 2 or self.dim % 2:
            raise ValueError(f"Projection(dim=...): expected an even number, 2 or more, got {self.dim!r}")

    def __call__(self, gradients: Mapping[str, FactoredGradients]) -> Float[Tensor, "n k"]:
        """Return the projected gradient of each sample, over all blocks."""
        projections: list[Tensor] = []
        spectra: list[Tensor] = []
        for name, block in gradients.items():
            hashes = _hashes(self.seed, self.dim, name, block.shape).to(block.outputs)
            if isinstance(block.inputs, Lookup):
                projections.append(_project_table(block.inputs, block.outputs, hashes, self.dim))
            # A small gradient is cheaper to write out than to transform.
            elif block.size < BINS_COST * self.dim * block.positions * block.shape[0]:
                projections.append(_project_elements(block, hashes, self.dim))
            else:
                spectra.append(_spectrum(block, block.inputs, hashes, self.dim))
        if spectra:  # summed before the transform back, which all blocks then share
            projections.append(torch.fft.irfft(torch.stack(spectra).sum(0), self.dim))
        return self.folded(torch.stack(projections).sum(0))

    def folded(self, full: Float[Tensor, "*lead k"]) -> Float[Tensor, "*lead half"]:
        """Return this projection from a full one, along the last dimension.

        Bins h mod dim/2 are a projection to dim/2 numbers, with the signs as they are or with those of the second half
        of the bins inverted. The errors of the two are uncorrelated.
        """
        if self.half is None:
            return full
        first, second = full.chunk(2, dim=-1)
        return first + self.half * second

    @property
    def halves(self) -> tuple[Projection, Projection]:
        """Both projections to half as many numbers."""
        return replace(self, half=1), replace(self, half=-1)


class Hashes(NamedTuple):
    """Bins and signs of a block's rows and columns.

    Args:
        outputs: bins, `(groups, o)`.
        inputs: bins, `(groups, i)`.
        output_signs: ±1, `(groups, o)`.
        input_signs: ±1, `(groups, i)`.
    """

    outputs: Int[Tensor, "groups o"]
    inputs: Int[Tensor, "groups i"]
    output_signs: Float[Tensor, "groups o"]
    input_signs: Float[Tensor, "groups i"]

    def to(self, like: Tensor) -> Hashes:
        """Return them on a tensor's device, the signs in its precision."""
        signs = (self.output_signs.to(like), self.input_signs.to(like))
        return Hashes(self.outputs.to(like.device), self.inputs.to(like.device), *signs)


@lru_cache(maxsize=1024)
def _hashes(seed: int, dim: int, block: str, shape: tuple[int, int, int]) -> Hashes:
    groups, o, i = shape
    # Not Python's `hash`, which differs from process to process.
    generator = torch.Generator().manual_seed(crc32(f"{seed}/{block}".encode()))
    bins = [torch.randint(0, dim, (groups, width), generator=generator) for width in (o, i)]
    signs = [torch.randint(0, 2, (groups, width), generator=generator) * 2.0 - 1 for width in (o, i)]
    return Hashes(bins[0], bins[1], signs[0], signs[1])


def _project_elements(gradients: FactoredGradients, hashes: Hashes, dim: int) -> Float[Tensor, "n k"]:
    """Return the projection of gradients that are written out, in chunks."""
    bins = (hashes.outputs[:, :, None] + hashes.inputs[:, None, :]) % dim
    signs = hashes.output_signs[:, :, None] * hashes.input_signs[:, None, :]
    projections = gradients.outputs.new_zeros(len(gradients), dim)
    for rows, chunk in gradients.chunks():
        projections[rows].index_add_(1, bins.flatten(), (chunk.gradients() * signs).flatten(1))
    return projections


def _spectrum(gradients: FactoredGradients, inputs: Tensor, hashes: Hashes, dim: int) -> Tensor:
    """Return the Fourier transform of the projection, `(n, dim // 2 + 1)`: convolutions are products in it."""
    groups, _, _ = gradients.shape
    step = max(1, LARGEST_CHUNK // (2 * dim * groups * gradients.positions))
    spectra = []
    for output_chunk, input_chunk in zip(gradients.outputs.split(step), inputs.split(step), strict=True):
        output_spectrum = _spectrum_of_vectors(output_chunk, hashes.outputs, hashes.output_signs, dim)
        input_spectrum = _spectrum_of_vectors(input_chunk, hashes.inputs, hashes.input_signs, dim)
        spectra.append((output_spectrum * input_spectrum).sum((1, 2)))
    return torch.cat(spectra)


def _spectrum_of_vectors(vectors: Tensor, bins: Tensor, signs: Tensor, dim: int) -> Tensor:
    """Return the transform of the projections of vectors `(n, groups, t, d)`, as `(n, t, groups, dim // 2 + 1)`."""
    n, groups, t, _ = vectors.shape
    flat = (vectors.transpose(1, 2) * signs).reshape(n * t, -1)
    # A range of bins for each group, so that one `index_add_` fills all of them.
    bins_of_groups = bins + dim * torch.arange(groups, device=bins.device)[:, None]
    projections = flat.new_zeros(n * t, groups * dim).index_add_(1, bins_of_groups.flatten(), flat)
    return torch.fft.rfft(projections.reshape(n, t, groups, dim))


def _project_table(lookup: Lookup, outputs: Tensor, hashes: Hashes, dim: int) -> Float[Tensor, "n k"]:
    """Return the projection of a table's gradients: only of the rows that were indexed."""
    bins = (hashes.outputs[0] + hashes.inputs[0][lookup.index][:, :, None]) % dim
    values = outputs[:, 0] * hashes.output_signs[0] * hashes.input_signs[0][lookup.index][:, :, None]
    return outputs.new_zeros(len(outputs), dim).scatter_add_(1, bins.flatten(1), values.flatten(1))
