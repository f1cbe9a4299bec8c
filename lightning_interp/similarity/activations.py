"""Forwards over a probe become one representation per layer, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_interp.data.batch import at_least_float32, count_samples
from lightning_interp.network.layers import layer_names, plain_name
from lightning_interp.network.layout import Layout, common_layout, layout_of, unpack
from lightning_interp.network.undisturbed import hooked
from lightning_interp.similarity.gram import FeatureBlock, centred_gram, check_rows
from lightning_interp.similarity.pooling import Pooling, feature_count, fit_mask, gives_many_rows, pool
from lightning_interp.similarity.representation import Form, Representation
from lightning_interp.similarity.sketch import Sketch

BYTES_PER_PASS = 440 * 2**20  # bounds the memory added to a process that trains; each further pass costs a forward
OUTPUT = "output"
Forward = Callable[[Any], object]
Mask = Callable[[Any], Tensor | None]


class CallIndex(NamedTuple):
    """One call of a layer within a forward: which layer, and the number of the call, from 0."""

    layer: str
    number: int


class FeatureRange(NamedTuple):
    """Columns `start` to `stop` of one call's features."""

    call: CallIndex
    start: int
    stop: int


@dataclass(frozen=True)
class Activations:
    """Which layers' outputs to take from a network, and how they become features.

    Args:
        layouts: layer → layout of each of its calls (None where it gives no features), in the order of first calls; ""
            is the network itself.
        pooling: how maps and sequences become features.
        mask: batch → which tokens count, `(n, tokens)`, or None.
        ends: layers whose output is the network's own.
    """

    layouts: Mapping[str, Sequence[Layout | None]]
    pooling: Pooling
    mask: Mask
    ends: Set[str] = frozenset()

    def widths(self) -> dict[CallIndex, int]:
        """Return how many features each call gives."""
        return {
            CallIndex(layer, number): feature_count(layout, self.pooling)
            for layer, calls in self.layouts.items()
            for number, layout in enumerate(calls)
            if layout is not None
        }

    def has_many_rows(self, call: CallIndex) -> bool:
        """Say whether a sample becomes several rows of this call."""
        layout = self.layouts[call.layer][call.number]
        return layout is not None and gives_many_rows(layout, self.pooling)

    def of(self, layers: Sequence[str]) -> Activations:
        """Return these layers alone."""
        layouts = {layer: calls for layer, calls in self.layouts.items() if layer in layers}
        return Activations(layouts, self.pooling, self.mask, self.ends)

    def label(self, call: CallIndex) -> str:
        """Return a call's name: the layer's, with the number of the call where there are several."""
        name = plain_name(call.layer) or OUTPUT
        return name if len(self.layouts[call.layer]) == 1 else f"{name}#{call.number}"

    def unmasked(self, batch: Any) -> list[str]:
        """Return the names of sequences that the batch's mask does not fit in length."""
        mask = self.mask(batch)
        if mask is None or self.pooling.tokens == "flatten":
            return []
        return [
            self.label(call)
            for call in self.widths()
            if (layout := self.layouts[call.layer][call.number])
            and layout.kind == "tokens"
            and not layout.packed
            and fit_mask(mask, layout.shape[0]) is None
        ]


def find_activations(
    module: nn.Module,
    forward: Forward,
    batches: Sequence[Any],
    pooling: Pooling = Pooling(),
    mask: Mask = lambda _: None,
) -> Activations:
    """Run a few samples to find the layout of what the network and each submodule gives, call by call.

    The network's own output is named "output", and left out where a submodule has that name.

    Args:
        module: the network.
        forward: runs it on a batch.
        batches: two, of different numbers of samples: the dimension that differs is that of the samples; an output
            without one is left out.
        pooling: how maps and sequences become features.
        mask: batch → which tokens count, `(n, tokens)`, or None.
    """
    layouts_by_batch: list[dict[str, list[Layout | None]]] = []
    last_outputs: dict[str, Tensor | None] = {}
    names = layer_names(module)
    if OUTPUT not in map(plain_name, names):
        names.append("")
    for batch in batches:
        batch_layouts: dict[str, list[Layout | None]] = {}
        n = count_samples(batch)

        # The loop's variables are bound as defaults, since they change.
        def hook(
            layer: str, submodule: nn.Module, _: Any, output: Any, n: int = n, layouts: Any = batch_layouts
        ) -> None:
            layouts.setdefault(layer, []).append(layout_of(submodule, output, n))
            tensor = unpack(output)[0]
            # A clone, as a later in-place operation may overwrite the output.
            last_outputs[layer] = None if tensor is None or tensor.is_nested else tensor.clone()

        with torch.no_grad(), hooked(module, names, hook):
            forward(batch)
        layouts_by_batch.append(batch_layouts)
    first, second = layouts_by_batch
    layouts = {layer: list(map(common_layout, calls, second.get(layer, []))) for layer, calls in first.items()}
    with_features = {
        layer: [layout if layout and feature_count(layout, pooling) else None for layout in calls]
        for layer, calls in layouts.items()
    }
    end = last_outputs.get("")
    ends = frozenset(layer for layer, tensor in last_outputs.items() if layer and _equal(tensor, end))
    return Activations({layer: calls for layer, calls in with_features.items() if any(calls)}, pooling, mask, ends)


def representations(
    module: nn.Module,
    forward: Forward,
    batches: Sequence[Any],
    activations: Activations,
    n: int,
    form: Form = "scores",
    bytes_per_pass: int = BYTES_PER_PASS,
    sketch: int | None = None,
    key: str = "",
) -> dict[str, Representation]:
    """Take each layer's features over all batches.

    Layers of more features than samples become the Gram matrix of their centred features, unless `form` is "features".
    Where the features of all layers exceed `bytes_per_pass`, the batches are run once more for each further block of
    columns, so that memory does not grow with the network, but for "features", which are kept. A layer of d features
    costs n² d operations, half as many as `X @ X.T`.

    Args:
        module: the network, in the state of interest.
        forward: runs it on a batch.
        batches: re-iterable, together `n` samples.
        activations: what to take.
        n: number of samples.
        form: what the measures need of each layer.
        bytes_per_pass: bound on the memory of one pass's features.
        sketch: reduce layers of more than twice as many features to this number by random signs first: an estimate
            for linear CKA, at a fraction of the cost and in one pass.
        key: what the random signs depend on beside the layer: the run and the step.

    Returns:
        layer (or `layer#call` where it is called several times) → representation on the CPU, in call order.

    Raises:
        ValueError: features are not finite, or a call gave another shape than before.
    """
    widths = activations.widths()
    to_sum = form != "features"
    summed = {call for call, width in widths.items() if to_sum and width > n and not activations.has_many_rows(call)}
    sketches = {
        call: Sketch(sketch, f"{key}/{activations.label(call)}")
        for call in summed
        if sketch and widths[call] > 2 * sketch
    }
    plan = _Plan(activations, n, widths, summed, sketches)
    grams: dict[CallIndex, Tensor] = {}
    by_call: dict[CallIndex, Representation] = {}
    for ranges in _passes(plan, max(1, bytes_per_pass // (4 * n))):
        outputs = _run(module, forward, batches, ranges, plan)
        for columns in list(outputs):
            call, block = columns.call, outputs.pop(columns)  # popped, so that its memory is free before the next one
            if isinstance(block, FeatureBlock):
                product = centred_gram(activations.label(call), block)
                grams[call] = grams[call].add_(product) if call in grams else product
            else:
                by_call[call] = plan.check_features(call, block.cpu())
    for call, gram in grams.items():
        size, signs = (sketches[call].size, sketches[call].signs) if call in sketches else (0, 0)
        by_call[call] = Representation(gram.cpu(), "gram", widths[call], size, signs)
    return {activations.label(call): by_call[call].reduced(form) for call in widths}


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@dataclass(frozen=True)
class _Plan:
    """What is taken of n samples: each call's width, which are summed to Gram matrices, which are sketched before."""

    activations: Activations
    n: int
    widths: Mapping[CallIndex, int]
    summed: Set[CallIndex]
    sketches: Mapping[CallIndex, Sketch]

    def column_count(self, call: CallIndex) -> int:
        """Return how many columns of a call are in memory: those of its sketch, where there is one."""
        return self.sketches[call].size if call in self.sketches else self.widths[call]

    def features(self, call: CallIndex, output: Any, mask: Tensor | None) -> Tensor:
        """Return a call's features of one batch."""
        layout = self.activations.layouts[call.layer][call.number]
        assert layout is not None
        features = at_least_float32(pool(output, layout, self.activations.pooling, mask).detach())
        if features.shape[1] != self.widths[call]:
            label = self.activations.label(call)
            raise ValueError(f"{label}: expected {self.widths[call]} features, got {features.shape[1]}")
        return self.sketches[call](features) if call in self.sketches else features

    def check_features(self, call: CallIndex, features: Tensor) -> Representation:
        """Return a call's features of all samples, once they are finite and as many rows as expected."""
        label = self.activations.label(call)
        if not self.activations.has_many_rows(call):
            check_rows(label, self.n, len(features))
        if not bool(features.isfinite().all()):
            raise ValueError(f"{label}: activations hold NaN or infinity")
        return Representation(features, "features", features.shape[1])


def _run(
    module: nn.Module, forward: Forward, batches: Sequence[Any], ranges: Sequence[FeatureRange], plan: _Plan
) -> dict[FeatureRange, Tensor | FeatureBlock]:
    """Return these columns of all samples, `(rows, columns)` each; to be summed: less the first batch's mean."""
    by_call = {columns.call: columns for columns in ranges}
    blocks = {columns: FeatureBlock(plan.n) for columns in ranges if columns.call in plan.summed}
    batch_features: dict[FeatureRange, list[Tensor]] = {c: [] for c in ranges if c.call not in plan.summed}
    calls: dict[str, int] = {}
    mask: Tensor | None = None

    def hook(layer: str, _: nn.Module, __: Any, output: Any) -> None:
        call = CallIndex(layer, calls.get(layer, 0))
        calls[layer] = call.number + 1
        if columns := by_call.get(call):
            features = plan.features(call, output, mask)
            if columns in blocks:
                blocks[columns].add(features[:, columns.start : columns.stop])
            else:
                batch_features[columns].append(features.clone())  # it may be a view, which the network overwrites

    layers = list(dict.fromkeys(columns.call.layer for columns in ranges))
    for batch in batches:
        mask = plan.activations.mask(batch)
        calls.clear()
        with torch.no_grad(), hooked(module, layers, hook):
            forward(batch)
    for columns, features in batch_features.items():
        check_rows(plan.activations.label(columns.call), len(batches), len(features), "batches")
    return {columns: torch.cat(batch_features.pop(columns)) for columns in list(batch_features)} | blocks


def _passes(plan: _Plan, columns_per_pass: int) -> list[list[FeatureRange]]:
    """Pack all calls' columns into passes, at most one block per call and pass."""
    passes: list[list[FeatureRange]] = [[]]
    free = columns_per_pass
    for call in plan.widths:
        start, width = 0, plan.column_count(call)
        while start < width:
            if free <= 0:
                passes.append([])
                free = columns_per_pass
            # Features that stay as they are take their memory in any case, and are not split.
            stop = min(width, start + free) if call in plan.summed else width
            passes[-1].append(FeatureRange(call, start, stop))
            free -= stop - start
            start = stop
    return passes
