"""Where the network looks on fixed validation samples, epoch after epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_interp.attribution import Attributor, Target
from lightning_interp.attribution.engine.sites import layer_of
from lightning_interp.callbacks.attribution.arguments import (
    ATTRIBUTION,
    Choice,
    check_methods,
    check_target,
    check_truth,
)
from lightning_interp.callbacks.attribution.panels import (
    AttributionSetup,
    ExplainedBatch,
    Panel,
    explain_probe,
    fixed_target,
    panels_of,
)
from lightning_interp.callbacks.attribution.recording import (
    SCORES_FILE,
    AttributionRun,
    default_methods,
    mask_of,
    open_map_store,
    record,
    wrong_panels,
)
from lightning_interp.callbacks.attribution.report import attribution_findings
from lightning_interp.callbacks.attribution.scores import read_scores
from lightning_interp.callbacks.guard import Guard, OnError, started_run
from lightning_interp.callbacks.publish import publish, room_of, run_folder
from lightning_interp.callbacks.trainer_data import (
    Source,
    evaluation_source,
    given_samples,
    settled_task,
    validation_source,
)
from lightning_interp.checks import check_count, dataset_in_words, tag
from lightning_interp.data.batch import device_of, slice_samples, to_device
from lightning_interp.data.probe import Probe, split_ragged, take_probe
from lightning_interp.data.task import Task
from lightning_interp.network.layers import match_layers
from lightning_interp.storage.folder import Folder
from lightning_interp.views.describe import with_dataset_names
from lightning_interp.views.display import Display

# Enough for a network at 99% to have a wrong answer among them nine times in ten, at one forward of a large batch.
POOL = 256


class InputAttribution(Callback):
    """Show, for fixed validation samples, which parts of the input the network's answer depends on, and since when.

    Panels are drawn before training and after each validation, so that TensorBoard's step slider plays a film;
    start TensorBoard with `--samples_per_plugin images=1000` to keep every frame. Beside them: the samples that are
    most confidently wrong at the moment, and numbers that say whether to trust the maps. Under `trainer.validate` and
    `trainer.test` the panels of that loader's samples are drawn once. All of it is stored in
    `<log_dir>/interp/attribution`: maps at no more than 64 × 64, numbers in `scores.csv`, the final panels and films.

    A second callback of this kind in a trainer needs other arguments than the first; its tags begin with
    `attribution-2`, and so does its folder.

    Panels explain `target`, by default the class predicted at that moment. The numbers over epochs are of a target that
    stays the same: the label where there is one class, else what was predicted before training.

    Logged, with `M` a method's tag and `S` a sample's id, at `trainer.global_step`:
        `attribution/M/S`: image: the sample beside its map and its likeliest classes. The colour scale ends at the
            largest value that this sample's map has had so far; the map's own largest value is in the caption.
        `attribution_wrong/M/K`: image: likewise of the sample that is the K-th most confidently wrong of 256.
        `attribution_film/M/S`: image after training: the sample's maps over epochs in a row, on one colour scale.
        `attribution_drift/M/to_previous`: scalar: Spearman's correlation of the maps with those of the evaluation
            before, mean over samples; 1 where nothing moved.
        `attribution_drift/M/to_final`: scalar for every evaluation, logged after training: likewise with the final
            maps.
        `attribution_dead/M`: scalar: share of maps that are zero everywhere or not finite.
        `attribution_deletion/M`, `attribution_insertion/M`: scalars every `score_every_n_epochs` and at the end: the
            target's mean probability (of a regression the output) while what the map calls most important is removed
            (lower is better), or alone brought back (higher is better). `M` is also `Centre` and `Edges` for images:
            maps that depend on no network.
        `attribution_sanity/M`: scalar at the same moments: rank correlation of the maps with those after the last layer
            was drawn anew; a method that stays near 1 does not depend on what the network has learned.
        `attribution_localization/M/pointing_game`, `attribution_localization/M/energy_inside`,
            `attribution_localization/M/error_at_0.2`, `attribution_localization/M/best_error`,
            `attribution_localization/M/best_threshold`: scalars at each evaluation, where `truth` is given, also
            of `Centre` and `Edges`: share of maps whose maximum is inside, share of the positive map inside, share of
            boxes that are missed at the published threshold, and at the one that is best for these samples.
        `attribution_notes/methods`: text after training: what the numbers are of, and from how many samples.
        `attribution_validate/M/S`, `attribution_test/M/S`: images under `trainer.validate` and `trainer.test`.
        `interp_seconds/InputAttribution`: scalar: seconds that this callback took since the last one.
        `interp_errors/InputAttribution`: text, only where it failed and switched itself off.

    Args:
        methods: attributors; when None, `GradCAM()` and `Saliency()` for images that pass through a map or tokens,
            else `Saliency()`.
        samples: how many fixed samples, evenly spread over the validation set.
        wrong: how many of the most confidently wrong to draw beside them; 0 for none.
        target: what panels explain: the "predicted" class, the "label", a class index, or a function from outputs to
            one number per sample.
        classes: one map for each of so many of the likeliest classes.
        truth: batch → where the object is: masks `(n, H, W)`, or boxes `(n, 4)` as x₀, y₀, x₁, y₁ in pixels.
        truth_samples: how many samples to measure against it.
        scored: how many of the fixed samples deletion, insertion and the sanity check are of; 0 for none.
        score_every_n_epochs: how often these are measured, at about 40 forwards of each sample and method.
        probe: a dataset or loader to take samples from, instead of the validation set.
        task: how to read a batch and call the model; `task.explained` names the input that is explained.
        display: how samples are shown; class names and normalisation come from the dataset where they can be found.
        budget_mb: what the maps may take on disk, in 10⁶ bytes; beyond it those between the first and the last are
            thinned, evenly.
        on_error: "warn" switches the callback off on its first failure and lets training continue; "raise" raises.

    Raises:
        ValueError, TypeError: an argument is invalid; always before the first batch.
    """

    def __init__(
        self,
        methods: Sequence[Attributor] | None = None,
        samples: int = 8,
        wrong: int = 4,
        target: Choice = "predicted",
        classes: int = 1,
        truth: Callable[[Any], Tensor] | None = None,
        truth_samples: int = 64,
        scored: int = 4,
        score_every_n_epochs: int = 5,
        probe: Any = None,
        task: Task = Task(),
        display: Display = Display(),
        budget_mb: float = 256,
        on_error: OnError = "warn",
    ) -> None:
        check_methods(methods)
        check_target(target, classes)
        check_truth(truth, budget_mb)
        for argument, value, least in (
            ("samples", samples, 1),
            ("wrong", wrong, 0),
            ("truth_samples", truth_samples, 1),
            ("scored", scored, 0),
            ("score_every_n_epochs", score_every_n_epochs, 1),
        ):
            check_count(ATTRIBUTION, argument, value, least)
        self.methods = None if methods is None else {tag(method): method for method in methods}
        self.samples, self.wrong = samples, wrong
        self.target, self.classes = target, classes
        self.truth, self.truth_samples = truth, truth_samples
        self.scored, self.score_every_n_epochs = scored, score_every_n_epochs
        self.probe = probe
        self.task = task
        self.display = display
        self.budget_mb = budget_mb
        arguments_given = any((methods, probe, truth)) or task != Task() or target != "predicted"
        self._guard = Guard(ATTRIBUTION, "attribution", on_error, arguments_given)
        self._run: AttributionRun | None = None
        self._restored: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Key of the callback in a checkpoint; two instances with other arguments get other keys."""
        return self._generate_state_key(
            methods=None if self.methods is None else list(self.methods),
            samples=(self.samples, self.wrong, self.scored, self.truth_samples),
            target=_stable_name(self.target),
            classes=self.classes,
            given=(dataset_in_words(self.probe) or False, self.truth is not None),
            task=(_stable_name(self.task.explained), _stable_name(self.task.outputs), self.task.kind),
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the layers that methods name, now that the model is configured."""
        for name, method in (self.methods or {}).items():
            layer = getattr(method, "layer", None)
            if isinstance(layer, str):
                match_layers(pl_module, [layer_of(layer)], f"{name}(layer=...)")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the samples, and draw what the untrained network sees in them."""
        self._guard.start(partial(self._start, run_folder(trainer)), trainer, pl_module, self)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the panels of this moment."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._guard.run(self._evaluate, trainer, pl_module)
        elif trainer.state.fn == TrainerFn.VALIDATING:
            self._evaluate_once("validate", trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the panels of test samples."""
        self._evaluate_once("test", trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the panels where there is no validation."""
        if not trainer.enable_validation:
            self._guard.run(self._evaluate, trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the final network's panels, the films, and compare all evaluations with the last."""
        self._guard.run(self._end, trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: where the history is, and what its numbers are of."""
        run = self._run
        if run is None:
            return dict(self._restored)
        return {
            "folder": run.own_folder.path,
            "fingerprint": run.probe.fingerprint,
            "targets": [None if callable(target) else target.tolist() for target in run.targets],
            "scales": dict(run.setup.scales),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of the run that is being resumed until training starts."""
        self._restored = dict(state_dict)

    def _start(self, folder: Folder, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # A second `fit` of the same trainer continues the history, as a resumed run does.
        earlier = self._restored or (self.state_dict() if trainer.global_step else {})
        self._run = None
        source = self._source(trainer)
        probe, setup = self._set_up(trainer, module, source)
        if earlier and earlier.get("fingerprint") != probe.fingerprint:
            self._guard.switch_off("its probe's samples differ from those of the run that it resumes")
            return
        setup.scales.update(earlier.get("scales", {}))
        batches = list(explain_probe(module, probe, setup))
        self._run = AttributionRun(
            folder=folder,
            room=self._guard.room,
            probe=probe,
            pool=self._more_samples(source, POOL, setup.task) if self.wrong else None,
            localized=self._more_samples(source, self.truth_samples, setup.task) if self.truth else None,
            setup=setup,
            targets=self._fixed_targets(batches, earlier),
            store=open_map_store(folder.folder(self._guard.room), probe, trainer.global_step, earlier),
            numbers=read_scores(Folder(earlier["folder"]), SCORES_FILE, trainer.global_step) if earlier else [],
            truth=self.truth,
            scored=self.scored,
            budget=self.budget_mb * 1e6,
            mask=mask_of(probe, setup.task),
        )
        self._restored = {}
        # A resumed run has these maps in its history.
        if not trainer.global_step:
            self._record(trainer, module, batches, 0, scored=False)
            self._log(trainer, panels_of(batches, setup, "before training"), "attribution")

    def _fixed_targets(self, batches: Sequence[ExplainedBatch], earlier: dict[str, Any]) -> list[Target]:
        """Return what the numbers over epochs are of, for each batch: as in the run that is resumed, if any."""
        stored = earlier.get("targets", [None] * len(batches))
        return [
            fixed_target(batch, self.target) if indices is None else torch.tensor(indices)
            for indices, batch in zip(stored, batches, strict=True)
        ]

    def _source(self, trainer: pl.Trainer) -> Source:
        if self.probe is not None:
            return Source(given_samples(trainer, self.probe), "given dataset")
        return validation_source(trainer, ATTRIBUTION)

    def _more_samples(self, source: Source, count: int, task: Task) -> Probe:
        return split_ragged(take_probe(source.samples, count, source.name, task), task)

    def _set_up(
        self, trainer: pl.Trainer, module: pl.LightningModule, source: Source
    ) -> tuple[Probe, AttributionSetup]:
        """Return the samples to explain, and how they are explained and shown."""
        probe = split_ragged(take_probe(source.samples, self.samples, source.name, self.task), self.task)
        task = settled_task(trainer, module, self.task, source.samples)
        first = task.inputs(to_device(slice_samples(probe.batches[0], 0, 1), device_of(module)))
        methods = self.methods or default_methods(module, first, task)
        inputs = [task.explained(task.inputs(batch)) for batch in probe.batches]
        display = with_dataset_names(self.display, source.samples, inputs)
        return probe, AttributionSetup(methods, task, display, self.target, self.classes)

    def _evaluate(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Record and draw this moment."""
        run, complete = started_run(self._run), trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        epoch = trainer.current_epoch + int(complete)
        moment = f"epoch {epoch}" if complete else f"step {trainer.global_step}"
        batches = list(explain_probe(module, run.probe, run.setup))
        self._record(trainer, module, batches, epoch, complete and epoch % self.score_every_n_epochs == 0)
        self._log(trainer, panels_of(batches, run.setup, moment), "attribution")
        self._log(trainer, wrong_panels(run, module, moment, self.wrong), "attribution_wrong")

    def _evaluate_once(self, stage: str, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw the samples of an evaluation's own loader, whether or not there was a fit before."""
        # The folder is otherwise set at the start of a fit, which there may not have been.
        self._guard.room = room_of(self, trainer, "attribution")

        def draw(trainer: pl.Trainer, module: pl.LightningModule) -> None:
            source = self._source(trainer) if self.probe is not None else evaluation_source(trainer, stage)
            probe, setup = self._set_up(trainer, module, source)
            panels = panels_of(explain_probe(module, probe, setup), setup, f"step {trainer.global_step}")
            self._log(trainer, panels, f"attribution_{stage}")

        self._guard.run(draw, trainer, module)

    def _record(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        batches: Sequence[ExplainedBatch],
        epoch: int,
        scored: bool,
    ) -> None:
        values = record(started_run(self._run), module, batches, trainer.global_step, epoch, scored)
        self._guard.loggers(trainer).scalars(values, trainer.global_step)

    def _end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        run = started_run(self._run)
        batches = list(explain_probe(module, run.probe, run.setup))
        self._record(trainer, module, batches, trainer.current_epoch, scored=True)
        publish(attribution_findings(run, batches), self._guard.loggers(trainer), run.folder, run.room)

    def _log(self, trainer: pl.Trainer, panels: dict[str, Panel], group: str) -> None:
        loggers = self._guard.loggers(trainer)
        for name, panel in panels.items():
            loggers.image(f"{group}/{name}", panel.draw(), trainer.global_step)


def _stable_name(choice: Any) -> str:
    """Return a choice in words that are the same in a resumed run: a function by its name."""
    return getattr(choice, "__qualname__", str(choice))
