"""How each layer's representation moves from its initial to its final state, as training goes."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_interp.callbacks.guard import Guard, OnError, started_run
from lightning_interp.callbacks.publish import publish, run_folder
from lightning_interp.callbacks.similarity.arguments import (
    FEWEST_SAMPLES,
    SIMILARITY,
    check_layer_patterns,
    check_measures,
    check_storage,
    checked_sketch,
    how_often,
    warn_beyond_budget,
)
from lightning_interp.callbacks.similarity.layers import check_names, chosen_layers
from lightning_interp.callbacks.similarity.report import similarity_findings
from lightning_interp.callbacks.similarity.resume import reason_not_to_resume, restored_state
from lightning_interp.callbacks.trainer_data import Source, given_samples, in_precision, progress_of, validation_source
from lightning_interp.checks import ArgumentError, check_count, dataset_in_words, tag
from lightning_interp.data.batch import count_samples, device_of, slice_samples, to_device
from lightning_interp.data.probe import Probe, take_probe
from lightning_interp.data.task import Task
from lightning_interp.similarity import CKA, SVCCA, AnyMeasure, Maps, Pooling, Tokens
from lightning_interp.similarity.activations import Activations, find_activations, representations
from lightning_interp.similarity.history import Failed, layerwise
from lightning_interp.similarity.matrix import needs, similarity
from lightning_interp.similarity.results import Snapshot
from lightning_interp.storage.folder import Folder
from lightning_interp.storage.snapshots import SnapshotStore, snapshot_from_state, snapshot_state


@dataclass(frozen=True)
class SimilarityRun:
    """The state of one fit.

    Args:
        folder: the run's.
        probe: the samples whose activations are recorded.
        activations: which layers' activations are recorded, and how.
        store: the snapshots so far.
        initial: the initial snapshot, as a checkpoint holds it.
        failed: measures that failed, each with its error.
    """

    folder: Folder
    probe: Probe
    activations: Activations
    store: SnapshotStore
    initial: dict[str, Any]
    failed: Failed = field(default_factory=dict)


class RepresentationSimilarity(Callback):
    """Compare each layer's activations on fixed samples with its initial and its final state.

    A snapshot of every layer is taken before the first step, at the end of each epoch (or as configured) and after
    the last, and stored in `<log_dir>/interp/similarity`, in the smallest form that the measures need. For kinds of
    linear CKA alone it takes n (n + 1) bytes per layer (0.26 MB for 512 samples), else 4 n² bytes or less.

    A second callback of this class in a trainer has the folder `similarity-2`, and its tags begin with it:
    `similarity-2_to_initial/M/L`, `interp_seconds/RepresentationSimilarity-2`; a third one likewise.

    Logged, with `M` a measure's tag and `L` a layer's name, at `trainer.global_step`:
        `similarity_to_initial/M/L`: scalar at each snapshot: now compared with before the first step.
        `similarity_to_final/M/L`: scalar for every snapshot, after training: then compared with the end.
        `similarity_to_final_normalised/M/L`: scalar for every snapshot, after training: (s − s₀) / (1 − s₀) of it, s₀
            its value before training: the share of its own way to the end that a layer has gone (NaN if that way is
            shorter than 0.01).
        `similarity_maps/M/layer_by_epoch_to_initial`, `similarity_maps/M/layer_by_epoch_to_final`,
            `similarity_maps/M/layer_by_epoch_to_final_normalised`: images after training, one row per layer, one
            column per snapshot.
        `similarity_maps/M/layer_by_layer`: image after training, the final network's layers with each other.
        `similarity_maps/M/layer_by_layer_to_final`: images after training, all layers of up to three earlier snapshots
            with all layers of the last, each at its step.
        `similarity_doubt/M`: text after training: by layer, the similarity of start and end, what it would be by
            chance, its standard error, and why not to trust it.
        `similarity_notes/probe`: text after training: samples, layers, and which numbers to distrust.
        `interp_seconds/RepresentationSimilarity`: scalar: seconds that this callback took since the last one.
        `interp_errors/RepresentationSimilarity`: text, only where a measure failed and is left out from then on, or the
            callback did and switched itself off.

    Args:
        layers: names or glob patterns of submodules; "output" is what the network itself gives. When None, those with
            weights of their own (norms left out), at most 24, evenly thinned, and the output where none gives it.
        measures: those of `lightning_interp.similarity`, any object with a `name` and `between(x, y)` of two
            representations, or any function of two `(n, d)` tensors. `PWCCA` and such functions see the neurons
            themselves: of layers wider than the probe is large only with `store="activations"`, NaN otherwise.
        samples: size of the probe, evenly spread over the validation set.
        probe: a dataset or loader to take the probe from, instead of the validation set.
        maps: how convolutional maps become features: "flatten" `(n, C · H · W)`, "pool" (the mean over positions), or
            "positions" (each of up to 16 positions is a row). Another choice than the first is part of `M`.
        tokens: how sequences do: "mean" over the tokens that `task.mask` keeps, "cls" (the first of them), "positions"
            (each of up to 16 tokens is a row) or "flatten". Another choice than the first is part of `M`.
        every_n_epochs: snapshots at the end of every so many epochs; each when neither is given.
        every_n_steps: snapshots after every so many optimizer steps instead.
        sketch: reduce wide layers to so many features by random signs, for linear CKA alone: an estimate that takes
            one pass over the probe however wide the network is; with 1024 it is off by about 0.01, at most 0.05.
        store: "compact", or "activations" for the activations themselves.
        budget_mb: what the snapshots may take on disk, in 10⁶ bytes; beyond it those between the first and the last are
            thinned, evenly, with a warning.
        task: how to read a batch and call the model.
        on_error: "warn" switches the callback off on its first failure and lets training continue; "raise" raises.

    Raises:
        ValueError, TypeError: an argument is invalid; always before the first batch.
    """

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        measures: Sequence[AnyMeasure] = (CKA(debiased=True), CKA(), SVCCA()),
        samples: int = 512,
        probe: Any = None,
        maps: Maps = "flatten",
        tokens: Tokens = "mean",
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        sketch: int | None = None,
        store: Literal["compact", "activations"] = "compact",
        budget_mb: float = 1024,
        task: Task = Task(),
        on_error: OnError = "warn",
    ) -> None:
        check_layer_patterns(layers)
        check_measures(measures)
        check_count(SIMILARITY, "samples", samples, FEWEST_SAMPLES)
        self.every_n_epochs, self.every_n_steps = how_often(every_n_epochs, every_n_steps)
        check_storage(store, budget_mb)
        self.sketch = checked_sketch(sketch, measures, store)
        self.layers = None if layers is None else tuple(layers)
        self.pooling = Pooling(maps, tokens)
        self.measures = {tag(measure) + self.pooling.tag: measure for measure in measures}
        self.samples = samples
        self.probe = probe
        self.form = "features" if store == "activations" else needs(measures, compact=True)
        self.budget_mb = budget_mb
        self.task = task
        arguments_given = layers is not None or probe is not None or task != Task()
        self._guard = Guard(SIMILARITY, "similarity", on_error, arguments_given)
        self._run: SimilarityRun | None = None
        self._last_step = 0
        self._finished_epochs = 0
        self._restored: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; two instances with other arguments get other keys."""
        return self._generate_state_key(
            layers=self.layers,
            measures=list(self.measures),
            samples=self.samples,
            probe=dataset_in_words(self.probe),
            every_n_epochs=self.every_n_epochs,
            every_n_steps=self.every_n_steps,
            sketch=self.sketch,
            form=self.form,
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the layers' names, now that the model is configured."""
        if self.layers is not None:
            check_names(pl_module, self.layers)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the probe and the initial snapshot."""
        self._last_step, self._finished_epochs = trainer.global_step, trainer.current_epoch
        self._guard.start(partial(self._start, run_folder(trainer)), trainer, pl_module, self)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Take a snapshot every `every_n_steps` steps."""
        every = self.every_n_steps
        # Not a remainder of 0: with several optimizers a batch takes several steps.
        if every is not None and trainer.global_step // every > self._last_step // every:
            self._last_step = trainer.global_step
            self._guard.run(partial(self._record, _finished_epochs(trainer)), trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a snapshot and compare it with the initial one, where it is this epoch's turn."""
        self._finished_epochs = _finished_epochs(trainer)
        complete = self._finished_epochs > trainer.current_epoch
        if complete and self.every_n_epochs is not None and self._finished_epochs % self.every_n_epochs == 0:
            self._guard.run(partial(self._record, self._finished_epochs), trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare every stored snapshot with the last one, and draw the maps."""
        self._guard.run(self._end, trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: where the history is, and the initial snapshot itself."""
        if self._run is None:
            return dict(self._restored)
        return {
            "folder": self._run.store.folder.path,
            "fingerprint": self._run.probe.fingerprint,
            # The snapshot itself, as the folder may not be there where the run is resumed.
            "initial": self._run.initial,
            "maps": self.pooling.maps,
            "tokens": self.pooling.tokens,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find the state of the run that is being resumed, where this callback had other arguments then."""
        self._restored = restored_state(self, getattr(trainer, "callbacks", []), checkpoint["callbacks"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of the run that is being resumed until training starts."""
        self._restored = dict(state_dict)

    def _start(self, folder: Folder, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # A second `fit` of the same trainer continues the history, as a resumed run does.
        earlier = self._restored or (self.state_dict() if trainer.global_step else {})
        self._run = None
        probe = self._take_probe(trainer)
        activations = self._choose_layers(trainer, module, probe)
        if earlier and (reason := reason_not_to_resume(earlier, probe, activations, self.pooling, self.form)):
            self._guard.switch_off(reason)
            return
        if trainer.global_step and not earlier:
            rank_zero_warn(f"{SIMILARITY}: 'initial' is step {trainer.global_step}, where this run starts")
        initial = earlier.get("initial") or snapshot_state(
            self._snapshot(trainer, module, probe, activations, folder, trainer.current_epoch)
        )
        store = self._open_store(folder.folder(self._guard.room), probe, trainer.global_step, earlier, initial)
        warn_beyond_budget(self.budget_mb, store)
        self._check_measures_work(snapshot_from_state(initial))
        self._run, self._restored = SimilarityRun(folder, probe, activations, store, initial), {}

    def _take_probe(self, trainer: pl.Trainer) -> Probe:
        source = (
            validation_source(trainer, SIMILARITY)
            if self.probe is None
            else Source(given_samples(trainer, self.probe), "given probe")
        )
        probe = take_probe(source.samples, self.samples, source.name, self.task)
        if probe.n < FEWEST_SAMPLES:
            kind = ValueError if self.probe is None else ArgumentError
            raise kind(
                f"probe: expected at least {FEWEST_SAMPLES} samples to compare, got {probe.n} of the {source.name}"
            )
        return probe

    def _choose_layers(self, trainer: pl.Trainer, module: pl.LightningModule, probe: Probe) -> Activations:
        """Run a few samples, and keep those of the requested layers that give features."""
        count = min(3, count_samples(probe.batches[0]))
        # Two numbers of samples: the dimension of an output that differs between them is that of the samples.
        batches = [slice_samples(probe.batches[0], 0, n) for n in (count, max(1, count - 1))]
        forward = partial(self._forward, trainer, module)
        called = find_activations(module, forward, batches, self.pooling, self.task.mask)
        return chosen_layers(module, self.layers, called, batches[0])

    def _open_store(
        self, folder: Folder, probe: Probe, step: int, earlier: dict[str, Any], initial: dict[str, Any]
    ) -> SnapshotStore:
        """Return the store of snapshots, with the initial one, and the history of the run that this one resumes."""
        facts = {
            "n": probe.n,
            "source": probe.source,
            "fingerprint": probe.fingerprint,
            "ids": list(probe.ids),
            "maps": self.pooling.maps,
            "tokens": self.pooling.tokens,
        }
        earlier_folder = Folder(earlier["folder"]) if earlier else None
        if earlier_folder is not None and not earlier_folder.exists("manifest.json"):
            rank_zero_warn(f"{SIMILARITY}: the snapshots before step {step} are gone from {earlier_folder.path}")
        return SnapshotStore.resume(folder, facts, step, earlier_folder, snapshot_from_state(initial))

    def _check_measures_work(self, snapshot: Snapshot) -> None:
        """Compare the narrowest layer with itself by every measure: one that fails does so before the first batch."""
        layer = min(snapshot.layers.values(), key=lambda representation: representation.width)
        for name, measure in self.measures.items():
            try:
                float(similarity(measure, layer, layer))
            except Exception as error:
                raise ArgumentError(
                    f"{SIMILARITY}(measures=...): {name} failed on a layer and itself: {error}"
                ) from error

    def _forward(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        task = in_precision(trainer, self.task)
        task.outputs(module, task.inputs(to_device(batch, device_of(module))))

    def _snapshot(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        probe: Probe,
        activations: Activations,
        folder: Folder,
        epoch: int,
    ) -> Snapshot:
        forward = partial(self._forward, trainer, module)
        key = f"{folder.path}/{trainer.global_step}"
        layers = representations(
            module, forward, probe.batches, activations, probe.n, self.form, sketch=self.sketch, key=key
        )
        return Snapshot(epoch, trainer.global_step, layers)

    def _record(self, epoch: int, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Store a snapshot of this moment, and log how each layer compares with its initial state."""
        run = started_run(self._run)
        snapshot = self._snapshot(trainer, module, run.probe, run.activations, run.folder, epoch)
        self._store(run, snapshot)
        with self._failures_apart(run, trainer) as failed:
            similarities = layerwise(self.measures, snapshot_from_state(run.initial), snapshot, failed)
        values = {
            f"similarity_to_initial/{name}/{layer}": value
            for name, by_layer in similarities.items()
            for layer, value in by_layer.items()
        }
        self._guard.loggers(trainer).scalars(values, snapshot.step)

    def _store(self, run: SimilarityRun, snapshot: Snapshot) -> None:
        """Store a snapshot, and thin the history where it outgrows the budget."""
        run.store.append(snapshot)
        thinned_before = run.store.thinned
        if run.store.thin(self.budget_mb * 1e6) and not thinned_before:
            rank_zero_warn(
                f"{SIMILARITY}: the snapshots outgrow budget_mb={self.budget_mb:g}; from now on those between the first"
                " and the last are thinned, evenly"
            )

    @contextmanager
    def _failures_apart(self, run: SimilarityRun, trainer: pl.Trainer) -> Iterator[Failed | None]:
        """Yield where to note measures that fail, None where they shall raise; warn of them, or raise if all did."""
        failed_before = set(run.failed)
        yield None if self._guard.on_error == "raise" else run.failed
        if len(run.failed) == len(self.measures):
            raise next(reversed(run.failed.values()))
        for name in run.failed.keys() - failed_before:
            error = "".join(traceback.format_exception(run.failed[name]))
            message = f"{name} failed and is left out from now on.\n{error}"
            rank_zero_warn(f"{SIMILARITY}: {message}")
            self._guard.log_error(trainer, message)

    def _end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        run = started_run(self._run)
        if run.store.steps[-1] != trainer.global_step:
            final = self._snapshot(trainer, module, run.probe, run.activations, run.folder, self._finished_epochs)
            self._store(run, final)
        with self._failures_apart(run, trainer) as failed:
            findings = similarity_findings(self.measures, run.store, self._notes(run), progress_of(trainer), failed)
            publish(findings, self._guard.loggers(trainer), run.folder, self._guard.room)

    def _notes(self, run: SimilarityRun) -> list[str]:
        """Return the notes on samples and layers that begin the report."""
        layers = ", ".join(run.store.read(run.store.steps[-1]).layers)
        notes = [
            f"Probe: {run.probe.n} samples of the {run.probe.source}, the same at every snapshot.",
            f"Layers: {layers}. {self.pooling.description}",
        ]
        if self.sketch:
            notes.append(f"Wide layers reduced to {self.sketch:,} features by random signs: CKA is an estimate.")
        if run.store.thinned:
            notes.append(
                f"{run.store.thinned} snapshots between the first and the last were deleted to stay within the budget."
            )
        if unmasked := run.activations.unmasked(run.probe.batches[0]):
            notes.append(f"All tokens count in {', '.join(unmasked)}: task.mask is of another length.")
        return notes


def _finished_epochs(trainer: pl.Trainer) -> int:
    """Return how many epochs are over, the current one too if this was its last batch."""
    return int(trainer.current_epoch) + bool(trainer.is_last_batch)
