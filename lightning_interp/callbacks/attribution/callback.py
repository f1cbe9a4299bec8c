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

from lightning_interp.attribution.engine.sites import layer_of
from lightning_interp.callbacks.attribution.arguments import (
    OWNER,
    Choice,
    check_methods,
    check_target,
    check_truth,
)
from lightning_interp.callbacks.attribution.panels import (
    AttributionSetup,
    answer_batches,
    draw_panels,
    explained_words,
    fixed_targets,
)
from lightning_interp.callbacks.attribution.recording import (
    SCORES,
    AttributionRun,
    Attributor,
    default_methods,
    history,
    mask_of,
    measure,
    wrong_panels,
)
from lightning_interp.callbacks.attribution.report import report_attribution
from lightning_interp.callbacks.attribution.scores import read_scores, scores_table
from lightning_interp.callbacks.guard import Guard, OnError, room_of, run_folder, started_run
from lightning_interp.callbacks.loggers import Loggers
from lightning_interp.callbacks.trainer_data import (
    Source,
    evaluation_source,
    given_samples,
    settled_task,
    validation_source,
)
from lightning_interp.checks import check_count, tag
from lightning_interp.data.batch import device_of, slice_samples, to_device
from lightning_interp.data.probe import Probe, split_ragged, take_probe
from lightning_interp.data.task import Task
from lightning_interp.network.layers import match_layers
from lightning_interp.storage.folder import Folder
from lightning_interp.views.canvas import Pixels
from lightning_interp.views.describe import with_dataset_names
from lightning_interp.views.display import Display, SampleView

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

    Panels explain what `target` says (the class predicted at that moment, unless told otherwise). The numbers over
    epochs are of a target that stays: the label where there is one class, else what was predicted before training.

    Logged, with `M` a method's tag and `S` a sample's id, at `trainer.global_step`:
        `attribution/M/S`: image: the sample beside its map and its likeliest classes. The colour scale ends at the
            largest value that this sample's map has had so far; the map's own largest value is in the caption.
        `attribution_wrong/M/K`: image: likewise of the sample that is the K-th most confidently wrong of 256.
        `attribution_film/M/S`: image after training: the sample's maps over epochs in a row, on one colour scale.
        `attribution_drift/M/to_previous`: scalar: Spearman's correlation of the maps with those of the look before,
            mean over samples; 1 where nothing moved.
        `attribution_drift/M/to_final`: scalar for every look, after training: likewise with the final maps.
        `attribution_dead/M`: scalar: share of maps that are zero everywhere or not finite.
        `attribution_deletion/M`, `attribution_insertion/M`: scalars every `score_every_n_epochs` and at the end: the
            target's mean probability (of a regression the output) while what the map calls most important is removed
            (lower is better), or alone brought back (higher is better). `M` is also `Centre` and `Edges` for images:
            maps that look at no network.
        `attribution_sanity/M`: scalar at the same moments: rank correlation of the maps with those after the last layer
            was drawn anew; a method that stays near 1 does not look at what the network has learned.
        `attribution_localization/M/pointing_game`, `attribution_localization/M/energy_inside`,
            `attribution_localization/M/error_at_0.2`, `attribution_localization/M/best_error`,
            `attribution_localization/M/best_threshold`: scalars at each look where `truth` is given, also of `Centre`
            and `Edges`: share of maps whose maximum is inside, share of the positive map inside, share of boxes that
            are missed at the published threshold, and at the one that is best for these samples.
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
        on_error: "warn" switches the callback off on its first failure and lets training go on; "raise" raises.

    Raises:
        ValueError, TypeError: an argument is off; always before the first batch.
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
            check_count(OWNER, argument, value, least)
        self.methods = None if methods is None else {tag(method): method for method in methods}
        self.samples, self.wrong = samples, wrong
        self.target, self.classes = target, classes
        self.truth, self.truth_samples = truth, truth_samples
        self.scored, self.score_every_n_epochs = scored, score_every_n_epochs
        self.probe = probe
        self.task = task
        self.display = display
        self.budget_mb = budget_mb
        chosen = any((methods, probe, truth)) or task != Task() or target != "predicted"
        self._shell = Guard(OWNER, on_error, chosen)
        self._run: AttributionRun | None = None
        self._room = "attribution"
        self._restored: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Key of the callback in a checkpoint; two instances with other arguments get other keys."""
        return self._generate_state_key(
            methods=None if self.methods is None else list(self.methods),
            samples=(self.samples, self.wrong, self.scored, self.truth_samples),
            target=_named(self.target),
            classes=self.classes,
            given=(self.probe is not None, self.truth is not None),
            task=(_named(self.task.explained), _named(self.task.outputs), self.task.kind),
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the layers that methods name, now that the model is configured."""
        for name, method in (self.methods or {}).items():
            layer = getattr(method, "layer", None)
            if isinstance(layer, str):
                match_layers(pl_module, [layer_of(layer)], f"{name}(layer=...)")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the samples, and draw what the untrained network sees in them."""
        folder = run_folder(trainer)
        self._room = room_of(self, trainer, "attribution")
        self._shell.start(partial(self._start, folder), trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the panels of this moment."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._shell.run(self._look, trainer, pl_module)
        elif trainer.state.fn == TrainerFn.VALIDATING:
            self._shell.run(partial(self._look_once, "validate"), trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the panels of test samples."""
        self._shell.run(partial(self._look_once, "test"), trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the panels where there is no validation."""
        if not trainer.enable_validation:
            self._shell.run(self._look, trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the final network's panels, the films, and compare all looks with the last."""
        self._shell.run(self._end, trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: where the history is, and what its numbers are of."""
        run = self._run
        if run is None:
            return dict(self._restored)
        return {
            "folder": run.folder.path,
            "fingerprint": run.probe.fingerprint,
            "targets": [None if callable(target) else target.tolist() for target in run.targets],
            "scales": dict(run.asked.scales),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of the run that is being resumed until training starts."""
        self._restored = dict(state_dict)

    def _start(self, root: Folder, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        earlier = self._restored or (self.state_dict() if trainer.global_step else {})
        self._run = None
        source = self._source(trainer)
        probe, asked = self._ask(trainer, module, source)
        if earlier and earlier.get("fingerprint") != probe.fingerprint:
            self._shell.switch_off("its probe's samples differ from those of the run that it goes on with")
            return
        asked.scales.update(earlier.get("scales", {}))
        pool = self._more(source, POOL, asked.task) if self.wrong else None
        measured = self._more(source, self.truth_samples, asked.task) if self.truth else None
        held = [fixed_targets(answer, self.target) for answer in answer_batches(module, probe, asked)]
        fixed = [
            target if was is None else torch.tensor(was)
            for was, target in zip(earlier.get("targets", [None] * len(held)), held, strict=True)
        ]
        folder = root.folder(self._room)
        store = history(folder, probe, trainer.global_step, earlier)
        numbers = read_scores(Folder(earlier["folder"]), SCORES, trainer.global_step) if earlier else []
        budget, mask = self.budget_mb * 1e6, mask_of(probe, asked.task)
        self._run = AttributionRun(
            folder, root, probe, pool, measured, asked, fixed, store, numbers, self.truth, self.scored, budget, mask
        )
        self._restored = {}
        self._first_look(trainer, module)

    def _first_look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw and measure the network before training; of a resumed one only see that it can be explained."""
        run = started_run(self._run)
        if trainer.global_step:
            draw_panels(module, run.probe, run.asked, "resumed")
        else:
            self._measure(trainer, module, 0, scored=False)
            self._log(trainer, draw_panels(module, run.probe, run.asked, "before training"), "attribution")

    def _source(self, trainer: pl.Trainer) -> Source:
        if self.probe is not None:
            return Source(given_samples(trainer, self.probe), "given dataset")
        return validation_source(trainer, OWNER)

    def _more(self, source: Source, count: int, task: Task) -> Probe:
        return split_ragged(take_probe(source.samples, count, source.name, task), task)

    def _ask(self, trainer: pl.Trainer, module: pl.LightningModule, source: Source) -> tuple[Probe, AttributionSetup]:
        probe = split_ragged(take_probe(source.samples, self.samples, source.name, self.task), self.task)
        task = settled_task(trainer, module, self.task, source.samples)
        inputs = task.inputs(to_device(slice_samples(probe.batches[0], 0, 1), device_of(module)))
        methods = self.methods or default_methods(module, inputs, task)
        display = with_dataset_names(
            self.display, source.samples, [task.explained(task.inputs(b)) for b in probe.batches]
        )
        return probe, AttributionSetup(methods, task, display, self.target, self.classes)

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw and measure this moment."""
        run, ended = started_run(self._run), trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        epoch = trainer.current_epoch + int(ended)
        moment = f"epoch {epoch}" if ended else f"step {trainer.global_step}"
        self._measure(trainer, module, epoch, ended and epoch % self.score_every_n_epochs == 0)
        self._log(trainer, draw_panels(module, run.probe, run.asked, moment), "attribution")
        self._log(trainer, wrong_panels(run, module, moment, self.wrong), "attribution_wrong")

    def _look_once(self, stage: str, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw the samples of an evaluation's own loader."""
        source = self._source(trainer) if self.probe is not None else evaluation_source(trainer, stage)
        probe, asked = self._ask(trainer, module, source)
        self._log(trainer, draw_panels(module, probe, asked, f"step {trainer.global_step}"), f"attribution_{stage}")

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int, scored: bool) -> None:
        found = measure(started_run(self._run), module, trainer.global_step, epoch, scored)
        Loggers(trainer.loggers, self._room).scalars(found, trainer.global_step)

    def _end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        run = started_run(self._run)
        self._measure(trainer, module, trainer.current_epoch, scored=True)
        final = draw_panels(module, run.probe, run.asked, "final network")
        shown: list[tuple[SampleView, str]] = []
        for answer, target in zip(answer_batches(module, run.probe, run.asked), run.targets, strict=True):
            words = (explained_words(answer, target, i, run.asked.display) for i in range(len(answer.shown)))
            shown += zip(answer.shown, words, strict=True)
        report_attribution(run, shown, final, self._room, Loggers(trainer.loggers, self._room))
        run.folder.write(SCORES, scores_table(run.numbers))

    def _log(self, trainer: pl.Trainer, drawn: dict[str, Pixels], group: str) -> None:
        board = Loggers(trainer.loggers, self._room)
        for name, pixels in drawn.items():
            board.image(f"{group}/{name}", pixels, trainer.global_step)


def _named(choice: Any) -> str:
    """Return a choice in words that are the same in a resumed run: a function by its name."""
    return getattr(choice, "__qualname__", str(choice))
