"""How each layer's representation moves from its initial to its final state, as training goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_interp import figures, report
from lightning_interp.batch import device_of, size, take, to_device
from lightning_interp.board import Board, clean, tag
from lightning_interp.callbacks.access import Source, given_samples, in_precision, validation_source
from lightning_interp.callbacks.shell import OnError, Shell, begun, progress_of, run_folder
from lightning_interp.callbacks.showing import write_section
from lightning_interp.errors import ArgumentError
from lightning_interp.layers import default_layers, match_layers
from lightning_interp.probe import Probe, take_probe
from lightning_interp.records import Snapshot
from lightning_interp.similarity import CKA, SVCCA, Measure
from lightning_interp.similarity.features import output_widths, representations
from lightning_interp.similarity.history import History, cautions, histories, layerwise
from lightning_interp.storage import (
    Folder,
    SnapshotStore,
    new_store,
    open_store,
    snapshot_from_state,
    snapshot_state,
)
from lightning_interp.task import Task

FEWEST = 4


@dataclass(frozen=True)
class _Run:
    """What one fit goes by: its folder, its probe, the layers' widths, its history and where it began."""

    folder: Folder
    probe: Probe
    widths: dict[str, list[int]]
    store: SnapshotStore
    initial: Snapshot


class RepresentationSimilarity(Callback):
    """Compare each layer's activations on fixed samples with its initial and its final state.

    A snapshot of every layer is taken before the first step and at the end of each epoch, and stored in
    `<log_dir>/interp/similarity`. Convolutional maps are flattened, `(n, channels · H · W)`.

    Logged, with `M` a measure's tag and `L` a layer's name, at `trainer.global_step`:
        `similarity_to_initial/M/L`: scalar at each epoch's end: now compared with before the first step.
        `similarity_to_final/M/L`: scalar for every snapshot, after training: then compared with the end.
        `similarity_maps/M/layer_by_epoch_to_initial`, `similarity_maps/M/layer_by_epoch_to_final`: images after
            training, one row per layer, one column per snapshot.
        `similarity_maps/M/layer_by_layer`: image after training, the final network's layers with each other.
        `similarity_notes/probe`: text after training: samples, layers, and which numbers to distrust.
        `interp_seconds/RepresentationSimilarity`: scalar: seconds that this callback took since the last one.
        `interp_errors/RepresentationSimilarity`: text, only where it failed and switched itself off.

    Args:
        layers: names or glob patterns of submodules; when None, those with weights of their own (norms left out),
            at most 24, evenly thinned.
        measures: those of `lightning_interp.similarity` (but PWCCA, which needs the neurons themselves), or any object
            with a `name` and `between(x, y)` of two representations.
        samples: size of the probe, evenly spread over the validation set.
        probe: a dataset or loader to take the probe from, instead of the validation set.
        task: how to read a batch and call the model.
        on_error: "warn" switches the callback off on its first failure and lets training go on; "raise" raises.

    Raises:
        ValueError, TypeError: an argument is off; always before the first batch.
    """

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        measures: Sequence[Measure] = (CKA(debiased=True), CKA(), SVCCA()),
        samples: int = 512,
        probe: Any = None,
        task: Task = Task(),
        on_error: OnError = "warn",
    ) -> None:
        _check_arguments(layers, measures, samples)
        self.layers = None if layers is None else tuple(layers)
        self.measures = {tag(measure): measure for measure in measures}
        self.samples = samples
        self.probe = probe
        self.task = task
        chosen = layers is not None or probe is not None or task != Task()
        self._shell = Shell("RepresentationSimilarity", on_error, chosen)
        self._run: _Run | None = None
        self._restored: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; two instances with other arguments get other keys."""
        return self._generate_state_key(layers=self.layers, measures=list(self.measures))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the layers' names, now that the model is configured."""
        if self.layers is not None:
            match_layers(pl_module, self.layers, "RepresentationSimilarity(layers=...)")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the probe and the initial snapshot."""
        folder = run_folder(trainer)
        self._shell.start(partial(self._start, folder), trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a snapshot and compare it with the initial one."""
        self._shell.run(self._epoch, trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare every stored snapshot with the last one, and draw the maps."""
        self._shell.run(self._end, trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: where the history is, and the initial snapshot itself."""
        if self._run is None:
            return dict(self._restored)
        return {
            "folder": self._run.store.folder.path,
            "fingerprint": self._run.probe.fingerprint,
            "initial": snapshot_state(self._run.initial),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of the run that is being resumed until training starts."""
        self._restored = dict(state_dict)

    def _start(self, folder: Folder, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        earlier = self._restored or (self.state_dict() if trainer.global_step else {})
        self._run = None
        if self.probe is not None:
            source = Source(given_samples(trainer, self.probe), "given dataset")
        else:
            source = validation_source(trainer, self._shell.owner)
        probe = take_probe(source.samples, self.samples, source.name, self.task)
        if probe.n < FEWEST:
            raise ArgumentError(f"probe: expected at least {FEWEST} samples to compare, got {probe.n}")
        widths = self._choose(trainer, module, probe)
        if differs := _differs(earlier, probe, widths):
            self._shell.switch_off(f"its {differs} differ from those of the run that it goes on with")
            return
        if earlier:
            store, initial = _resumed(folder, probe, trainer.global_step, earlier)
        else:
            if trainer.global_step:
                rank_zero_warn(f"{self._shell.owner}: 'initial' is step {trainer.global_step}, where this run starts")
            initial = self._look(trainer, module, probe, widths, trainer.current_epoch)
            store = new_store(folder.folder("similarity"), _facts(probe))
            store.append(initial)
        self._run, self._restored = _Run(folder, probe, widths, store, initial), {}

    def _choose(self, trainer: pl.Trainer, module: pl.LightningModule, probe: Probe) -> dict[str, list[int]]:
        """Run two samples, and keep those of the layers asked for that give features."""
        few = take(probe.batches[0], 0, 2)
        called = output_widths(module, partial(self._forward, trainer, module), few, size(few))
        if self.layers is None:
            chosen = default_layers(module, called)
        else:
            chosen = match_layers(module, self.layers)
            if silent := [layer for layer in chosen if layer not in called]:
                raise ArgumentError(
                    "RepresentationSimilarity(layers=...): expected layers that forward calls and that give floats"
                    f" with one row per sample, got {', '.join(silent)}"
                )
        if not chosen:
            raise ValueError(f"RepresentationSimilarity: {type(module).__name__}'s forward calls no layer to look at")
        return {layer: widths for layer, widths in called.items() if layer in chosen}

    def _forward(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        task = in_precision(trainer, self.task)
        task.outputs(module, task.inputs(to_device(batch, device_of(module))))

    def _look(
        self, trainer: pl.Trainer, module: pl.LightningModule, probe: Probe, widths: dict[str, list[int]], epoch: int
    ) -> Snapshot:
        forward = partial(self._forward, trainer, module)
        layers = representations(module, forward, probe.batches, widths, probe.n)
        return Snapshot(epoch, trainer.global_step, layers)

    def _epoch(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        run = begun(self._run)
        now = self._look(trainer, module, run.probe, run.widths, trainer.current_epoch + 1)
        run.store.append(now)
        values = {
            f"similarity_to_initial/{name}/{layer}": value
            for name, measure in self.measures.items()
            for layer, value in zip(now.layers, layerwise(measure, run.initial, now), strict=True)
        }
        Board(trainer.loggers).scalars(values, now.step)

    def _end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        run = begun(self._run)
        if run.store.steps[-1] != trainer.global_step:
            run.store.append(self._look(trainer, module, run.probe, run.widths, trainer.current_epoch))
        steps = run.store.steps
        final = run.store.read(steps[-1])
        watched = progress_of(trainer)(steps, len(steps), "comparing representations")
        compared = histories(self.measures, run.initial, final, map(run.store.read, watched))
        notes = _notes(run.probe, final, self.measures)
        board = Board(trainer.loggers)
        drawn: dict[str, dict[str, bytes]] = {}
        for name, history in compared.items():
            for layer, values in zip(final.layers, history.to_final.values.tolist(), strict=True):
                board.history(f"similarity_to_final/{name}/{layer}", steps, values)
            drawn[name] = _draw(board, run.folder, name, history, final.step)
        board.text("similarity_notes/probe", "\n\n".join(notes), final.step)
        write_section(run.folder, "similarity", report.similarity_section(drawn, notes))


def _differs(earlier: dict[str, Any], probe: Probe, widths: dict[str, list[int]]) -> str:
    """Say what keeps a run from going on with an earlier one's snapshots; empty if nothing does."""
    if not earlier:
        return ""
    if earlier["fingerprint"] != probe.fingerprint:
        return "probe's samples"
    layers = {layer.split("#")[0] for layer in earlier["initial"]["widths"]}
    return "" if layers == set(widths) else "layers"


def _resumed(folder: Folder, probe: Probe, step: int, earlier: dict[str, Any]) -> tuple[SnapshotStore, Snapshot]:
    """Take over the initial reference, and the history up to the checkpoint's step if it is still there."""
    initial = snapshot_from_state(earlier["initial"])
    before = Folder(earlier["folder"])
    history = open_store(before) if before.exists("manifest.json") else None
    store = new_store(folder.folder("similarity"), _facts(probe))
    store.append(initial)
    if history is None:
        rank_zero_warn(f"RepresentationSimilarity: the snapshots before step {step} are gone from {before.path}")
    else:
        store.adopt(history.read(s) for s in history.steps if initial.step < s <= step)
    return store, initial


def _facts(probe: Probe) -> dict[str, Any]:
    return {"n": probe.n, "source": probe.source, "fingerprint": probe.fingerprint, "ids": list(probe.ids)}


def _draw(board: Board, folder: Folder, measure: str, history: History, step: int) -> dict[str, bytes]:
    """Draw a measure's three maps on the board and into the folder; return them as PNG by name."""
    tables = {
        "layer_by_epoch_to_initial": history.to_initial,
        "layer_by_epoch_to_final": history.to_final,
        "layer_by_layer": history.layers,
    }
    drawn = {}
    for name, table in tables.items():
        pixels = figures.heat_map(table)
        board.image(f"similarity_maps/{measure}/{name}", pixels, step)
        drawn[name] = figures.png(pixels)
        folder.write(f"similarity/{clean(measure)}-{name}.png", drawn[name])
    return drawn


def _notes(probe: Probe, final: Snapshot, measures: dict[str, Measure]) -> list[str]:
    lines = [
        f"Probe: {probe.n} samples of the {probe.source}, the same at every epoch.",
        f"Layers: {', '.join(final.layers)}; maps flattened, one feature per channel and position.",
        "1 means the same up to the measure's invariance, 0 unrelated.",
    ]
    return lines + [f"{name}: {said}." for name, measure in measures.items() if (said := cautions(measure, final))]


def _check_arguments(layers: Any, measures: Any, samples: Any) -> None:
    owner = "RepresentationSimilarity"
    if layers is not None and (isinstance(layers, str) or not all(isinstance(layer, str) for layer in layers)):
        raise TypeError(f"{owner}(layers=...): expected a list of names or patterns, got {layers!r}")
    if layers is not None and not list(layers):
        raise ValueError(f"{owner}(layers=...): expected at least one name or pattern, or None; got none")
    if not isinstance(measures, (list, tuple)) or not measures:
        raise TypeError(f"{owner}(measures=...): expected a list of at least one measure, got {measures!r}")
    for measure in measures:
        if isinstance(measure, type) or not callable(getattr(measure, "between", None)):
            raise TypeError(f"{owner}(measures=...): expected measures such as CKA(), got {measure!r}")
    names = [tag(measure) for measure in measures]
    if len(set(names)) < len(names):
        raise ValueError(f"{owner}(measures=...): expected each measure once, got {', '.join(names)}")
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < FEWEST:
        raise ValueError(f"{owner}(samples=...): expected a whole number from {FEWEST}, got {samples!r}")
