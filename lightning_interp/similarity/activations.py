"""From forwards over a probe to one representation per layer, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp.data.batch import at_least_float32, count_samples
from lightning_interp.network.layers import layer_names, plain_name
from lightning_interp.network.layout import Layout, agreed_layout, layout_of, unpack
from lightning_interp.network.undisturbed import hooked
from lightning_interp.similarity.gram import FeatureBlock, centred_gram, check_rows
from lightning_interp.similarity.pooling import Pooling, fitted, many_rows, rows, width
from lightning_interp.similarity.representation import Form, Representation
from lightning_interp.similarity.sketch import Sketch

BYTES_PER_PASS = 440 * 2**20
OUTPUT = "output"
Forward = Callable[[Any], object]
Mask = Callable[[Any], Tensor | None]


class CallIndex(NamedTuple):
    """One call of a layer within a forward."""

    layer: str
    place: int


class FeatureRange(NamedTuple):
    """Columns `start` to `stop` of one call's features."""

    call: CallIndex
    start: int
    stop: int


@dataclass(frozen=True)
class Activations:
    """What to take from a network, found by running a few samples.

    Args:
        layouts: layer → what each of its calls gives (None where it is no features), in the order of first calls; ""
            is the network itself.
        reading: what to make of maps and sequences.
        mask: batch → which tokens count, `(n, tokens)`, or None.
        ends: layers that give what the network itself does.
    """

    layouts: Mapping[str, Sequence[Layout | None]]
    reading: Pooling
    mask: Mask
    ends: Set[str] = frozenset()

    def widths(self) -> dict[CallIndex, int]:
        """Return how many features each call gives."""
        return {
            CallIndex(layer, place): width(layout, self.reading)
            for layer, calls in self.layouts.items()
            for place, layout in enumerate(calls)
            if layout is not None
        }

    def many(self, call: CallIndex) -> bool:
        """Say whether a sample becomes several rows of this call."""
        layout = self.layouts[call.layer][call.place]
        return layout is not None and many_rows(layout, self.reading)

    def of(self, layers: Sequence[str]) -> Activations:
        """Return the same for some of the layers."""
        chosen = {layer: calls for layer, calls in self.layouts.items() if layer in layers}
        return Activations(chosen, self.reading, self.mask, self.ends)

    def label(self, call: CallIndex) -> str:
        """Return a call's name: the layer's, with the number of the call where there are several."""
        name = plain_name(call.layer) or OUTPUT
        return name if len(self.layouts[call.layer]) == 1 else f"{name}#{call.place}"

    def unmasked(self, batch: Any) -> list[str]:
        """Return the names of sequences for which the batch's mask is of a wrong length."""
        mask = self.mask(batch)
        if mask is None or self.reading.tokens == "flatten":
            return []
        return [
            self.label(call)
            for call in self.widths()
            if (layout := self.layouts[call.layer][call.place])
            and layout.kind == "tokens"
            and not layout.packed
            and fitted(mask, layout.shape[0]) is None
        ]


def find_activations(
    module: nn.Module,
    forward: Forward,
    batches: Sequence[Any],
    reading: Pooling = Pooling(),
    mask: Mask = lambda _: None,
) -> Activations:
    """Run a few samples and see what the network and each submodule gives, call by call.

    The network itself is left out where a submodule has the name that it would go by, "output".

    Args:
        module: the network.
        forward: runs it on a batch.
        batches: two, of different numbers of samples: the dimension that differs is that of the samples; an output
            without one is left out.
        reading: what to make of maps and sequences.
        mask: batch → which tokens count, `(n, tokens)`, or None.
    """
    seen: list[dict[str, list[Layout | None]]] = []
    given: dict[str, Tensor | None] = {}
    names = layer_names(module)
    if OUTPUT not in map(plain_name, names):
        names.append("")
    for batch in batches:
        found: dict[str, list[Layout | None]] = {}

        def hook(
            layer: str, part: nn.Module, _: Any, output: Any, n: int = count_samples(batch), found: Any = found
        ) -> None:
            found.setdefault(layer, []).append(layout_of(part, output, n))
            tensor = unpack(output)[0]
            given[layer] = None if tensor is None or tensor.is_nested else tensor.clone()

        with torch.no_grad(), hooked(module, names, hook):
            forward(batch)
        seen.append(found)
    first, second = seen
    layouts = {layer: list(map(agreed_layout, calls, second.get(layer, []))) for layer, calls in first.items()}
    wide = {
        layer: [call if call and width(call, reading) else None for call in calls] for layer, calls in layouts.items()
    }
    end = given.get("")
    ends = frozenset(layer for layer, tensor in given.items() if layer and _equal(tensor, end))
    return Activations({layer: calls for layer, calls in wide.items() if any(calls)}, reading, mask, ends)


def representations(
    module: nn.Module,
    forward: Forward,
    batches: Sequence[Any],
    watched: Activations,
    n: int,
    form: Form = "scores",
    bytes_per_pass: int = BYTES_PER_PASS,
    sketch: int | None = None,
    key: str = "",
) -> dict[str, Representation]:
    """Take each layer's features over all batches.

    Layers of more features than samples become the Gram matrix of their centred features, unless `form` is "features".
    Where the features of all layers exceed `bytes_per_pass`, the batches are run again for the next columns, so that
    memory does not grow with the network, but for "features", which are kept. For a layer of d features, n² d
    multiplications and additions are the least, half as many products as `X @ X.T` makes.

    Args:
        module: the network, in the state to look at.
        forward: runs it on a batch.
        batches: re-iterable, together `n` samples.
        watched: what to take.
        n: number of samples.
        form: what the measures need of each layer.
        bytes_per_pass: features held at a time.
        sketch: reduce layers of more than twice as many features to this number by random signs first: an estimate
            for linear CKA, at a fraction of the cost and in one pass.
        key: what the signs depend on beside the layer: the run and the moment.

    Returns:
        layer (or `layer#call` where it is called several times) → representation on the CPU, in the order of `watched`.

    Raises:
        ValueError: features are not finite, or a call gave another shape than before.
    """
    widths = watched.widths()
    summed = {call for call, width in widths.items() if width > n and form != "features" and not watched.many(call)}
    sketches = {
        call: Sketch(sketch, f"{key}/{watched.label(call)}") for call in summed if sketch and widths[call] > 2 * sketch
    }
    plan = _Plan(watched, n, widths, summed, sketches)
    grams: dict[CallIndex, Tensor] = {}
    made: dict[CallIndex, Representation] = {}
    for columns in _passes(plan, max(1, bytes_per_pass // (4 * n))):
        held = _run(module, forward, batches, columns, plan)
        for column in list(held):
            call, kept = column.call, held.pop(column)
            if isinstance(kept, FeatureBlock):
                product = centred_gram(watched.label(call), kept)
                grams[call] = grams[call].add_(product) if call in grams else product
            else:
                made[call] = plan.whole(call, kept.cpu())
    for call, gram in grams.items():
        size, signs = (sketches[call].size, sketches[call].signs) if call in sketches else (0, 0)
        made[call] = Representation(gram.cpu(), "gram", widths[call], size, signs)
    return {watched.label(call): made[call].reduced(form) for call in widths}


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@dataclass(frozen=True)
class _Plan:
    """What is taken of n samples: each call's width, which are summed to Gram matrices, which are sketched before."""

    watched: Activations
    n: int
    widths: Mapping[CallIndex, int]
    summed: Set[CallIndex]
    sketches: Mapping[CallIndex, Sketch]

    def held(self, call: CallIndex) -> int:
        """Return how many columns of a call are held."""
        return self.sketches[call].size if call in self.sketches else self.widths[call]

    def features(self, call: CallIndex, output: Any, mask: Tensor | None) -> Tensor:
        """Return a call's features of one batch."""
        layout = self.watched.layouts[call.layer][call.place]
        assert layout is not None
        features = at_least_float32(rows(output, layout, self.watched.reading, mask).detach())
        if features.shape[1] != self.widths[call]:
            label = self.watched.label(call)
            raise ValueError(f"{label}: expected {self.widths[call]} features, got {features.shape[1]}")
        return self.sketches[call](features) if call in self.sketches else features

    def whole(self, call: CallIndex, features: Tensor) -> Representation:
        """Return a call's features of all samples."""
        label = self.watched.label(call)
        if not self.watched.many(call):
            check_rows(label, self.n, len(features))
        if not bool(features.isfinite().all()):
            raise ValueError(f"{label}: activations hold NaN or infinity")
        return Representation(features, "features", features.shape[1])


def _run(
    module: nn.Module, forward: Forward, batches: Sequence[Any], columns: Sequence[FeatureRange], plan: _Plan
) -> dict[FeatureRange, Tensor | FeatureBlock]:
    """Return the wanted columns of all samples, `(rows, columns)` each; to be summed: less the first batch's mean."""
    wanted = {column.call: column for column in columns}
    blocks = {column: FeatureBlock(plan.n) for column in columns if column.call in plan.summed}
    parts: dict[FeatureRange, list[Tensor]] = {column: [] for column in columns if column.call not in plan.summed}
    calls: dict[str, int] = {}
    mask: Tensor | None = None

    def hook(layer: str, _: nn.Module, __: Any, output: Any) -> None:
        call = CallIndex(layer, calls.get(layer, 0))
        calls[layer] = call.place + 1
        if column := wanted.get(call):
            features = plan.features(call, output, mask)
            if column in blocks:
                blocks[column].add(features[:, column.start : column.stop])
            else:
                parts[column].append(features.clone())

    layers = list(dict.fromkeys(column.call.layer for column in columns))
    for batch in batches:
        mask = plan.watched.mask(batch)
        calls.clear()
        with torch.no_grad(), hooked(module, layers, hook):
            forward(batch)
    for column, kept in parts.items():
        check_rows(plan.watched.label(column.call), len(batches), len(kept), "batches")
    return {column: torch.cat(parts.pop(column)) for column in list(parts)} | blocks


def _passes(plan: _Plan, columns_per_pass: int) -> list[list[FeatureRange]]:
    """Pack all calls' columns into passes, at most one block per call and pass."""
    passes: list[list[FeatureRange]] = [[]]
    free = columns_per_pass
    for call in plan.widths:
        start, width = 0, plan.held(call)
        while start < width:
            if free <= 0:
                passes.append([])
                free = columns_per_pass
            stop = min(width, start + free) if call in plan.summed else width
            passes[-1].append(FeatureRange(call, start, stop))
            free -= stop - start
            start = stop
    return passes
