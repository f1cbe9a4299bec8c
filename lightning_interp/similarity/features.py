"""From forwards over a probe to one representation per layer, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp.batch import precise
from lightning_interp.capture import capture
from lightning_interp.records import Representation
from lightning_interp.similarity.representation import centre, from_gram, gram, prepare

BYTES_PER_PASS = 256 * 2**20
Forward = Callable[[Any], object]


class Columns(NamedTuple):
    """Columns `start` to `stop` of one call of one layer's flattened output."""

    layer: str
    call: int
    start: int
    stop: int


def output_widths(module: nn.Module, forward: Forward, batch: Any, n: int) -> dict[str, list[int]]:
    """Run one batch and say how many features per sample each submodule gave, call by call.

    Args:
        module: the network.
        forward: runs it on a batch.
        batch: a batch of `n` samples.
        n: number of samples; an output that does not start with this dimension is left out.

    Returns:
        layer → width of each call, in the order of first calls; a call without one row per sample is 0.
    """
    names = [name for name, _ in module.named_modules() if name]
    with torch.no_grad(), capture(module, names, lambda _, __, out: _width(out, n)) as seen:
        forward(batch)
    return {layer: widths for layer, widths in seen.items() if any(widths)}


def representations(
    module: nn.Module,
    forward: Forward,
    batches: Sequence[Any],
    widths: Mapping[str, Sequence[int]],
    n: int,
    bytes_per_pass: int = BYTES_PER_PASS,
) -> dict[str, Representation]:
    """Prepare each layer's features over all batches, flattened to `(n, d)`.

    A layer wider than n enters as the Gram matrix of its centred features, summed over blocks of columns;
    when the features of all layers exceed `bytes_per_pass`, the batches are run again for the next columns,
    so that memory never grows with the network.

    Args:
        module: the network, in the state to look at.
        forward: runs it on a batch.
        batches: re-iterable, together `n` samples.
        widths: layers to keep, as `output_widths` gave them.
        n: number of samples.
        bytes_per_pass: features held at a time.

    Returns:
        layer (or `layer#call` where it is called several times) → representation on the CPU, in the order of `widths`.

    Raises:
        ValueError: features are not finite, or a call gave another width than before.
    """
    kept: dict[tuple[str, int], Tensor] = {}
    for columns in _passes(widths, max(1, bytes_per_pass // (4 * n))):
        for column, block in _run(module, forward, batches, columns, widths, n).items():
            key, width = (column.layer, column.call), widths[column.layer][column.call]
            _check(column.layer, block)
            kept[key] = _add(kept.get(key), block, wide=width > n)
    return {
        _label(layer, call, calls): _finish(kept[layer, call], width, wide=width > n)
        for layer, calls in widths.items()
        for call, width in enumerate(calls)
        if width
    }


def _run(
    module: nn.Module,
    forward: Forward,
    batches: Sequence[Any],
    columns: Sequence[Columns],
    widths: Mapping[str, Sequence[int]],
    n: int,
) -> dict[Columns, Tensor]:
    """Return the wanted columns of all samples, `(n, columns)` each."""
    wanted: dict[tuple[str, int], Columns] = {(c.layer, c.call): c for c in columns}

    def keep(layer: str, call: int, output: Tensor) -> Tensor | None:
        column = wanted.get((layer, call))
        if column is None:
            return None
        flat = output.flatten(1)
        if flat.shape[1] != widths[layer][call]:
            raise ValueError(f"{layer}: expected {widths[layer][call]} features per sample, got {flat.shape[1]}")
        return precise(flat[:, column.start : column.stop]).clone()

    rows: dict[Columns, Tensor] = {}
    layers = list(dict.fromkeys(column.layer for column in columns))
    done = 0
    for batch in batches:
        with torch.no_grad(), capture(module, layers, keep) as seen:
            forward(batch)
        for (layer, call), column in wanted.items():
            part = seen[layer][call]
            if column not in rows:
                rows[column] = part.new_empty(n, part.shape[1])
            rows[column][done : done + len(part)] = part
        done += len(part)
    if done != n:
        raise ValueError(f"batches: expected {n} samples, got {done}")
    return rows


def _passes(widths: Mapping[str, Sequence[int]], columns_per_pass: int) -> list[list[Columns]]:
    """Pack all layers' columns into passes, one block per call of a layer and pass."""
    passes: list[list[Columns]] = [[]]
    free = columns_per_pass
    for layer, calls in widths.items():
        for call, width in enumerate(calls):
            start = 0
            while start < width:
                if free == 0:
                    passes.append([])
                    free = columns_per_pass
                stop = min(width, start + free)
                passes[-1].append(Columns(layer, call, start, stop))
                free -= stop - start
                start = stop
    return [columns for columns in passes if columns]


def _add(kept: Tensor | None, block: Tensor, wide: bool) -> Tensor:
    if not wide:
        return block if kept is None else torch.cat([kept, block], dim=1)
    product = gram(centre(block))
    return product if kept is None else kept.add_(product.to(kept.dtype))


def _finish(kept: Tensor, width: int, wide: bool) -> Representation:
    """Decompose on the CPU: in float64, which not every device has, and where stored snapshots are compared."""
    return from_gram(kept.cpu(), width) if wide else prepare(kept.cpu())


def _check(layer: str, block: Tensor) -> None:
    if not bool(block.isfinite().all()):
        raise ValueError(f"{layer}: activations hold NaN or infinity")


def _label(layer: str, call: int, calls: Sequence[int]) -> str:
    return f"{layer}#{call}" if len(calls) > 1 else layer


def _width(output: Tensor, n: int) -> int:
    rows = not output.is_nested and output.ndim >= 2 and output.shape[0] == n and output.is_floating_point()
    return output[0].numel() if rows else 0
