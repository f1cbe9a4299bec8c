"""Where the network looks on fixed validation samples, epoch after epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_interp import panels, report
from lightning_interp.attribution import GradCAM, Saliency
from lightning_interp.batch import device_of, row, size, take, to_device
from lightning_interp.board import Board, clean, tag
from lightning_interp.callbacks.access import Source, given_samples, settled_task, validation_source
from lightning_interp.callbacks.shell import OnError, Shell, begun, run_folder
from lightning_interp.callbacks.showing import shown_samples, targets_of, with_class_names, write_section
from lightning_interp.display import Display, kind_of
from lightning_interp.figures import png
from lightning_interp.layers import match_layers
from lightning_interp.probe import Probe, take_probe
from lightning_interp.records import Explanation, Pixels
from lightning_interp.storage import Folder
from lightning_interp.task import Problem, Task, predicted

Attributor = Callable[..., Explanation]


@dataclass(frozen=True)
class _Run:
    """What one fit goes by: its folder, its samples, how they are read, shown and by which methods explained."""

    folder: Folder
    probe: Probe
    task: Task
    display: Display
    methods: dict[str, Attributor]


class InputAttribution(Callback):
    """Show, for fixed validation samples, which parts of the input the predicted class's logit depends on.

    Panels are drawn before training and after each validation, so that TensorBoard's step slider plays a film;
    start TensorBoard with `--samples_per_plugin images=1000` to keep every frame. The last frame of each is stored
    in `<log_dir>/interp/attribution`.

    Logged, with `M` a method's tag and `S` a sample's id, at `trainer.global_step`:
        `attribution/M/S`: image: the sample beside its map, with true class, predicted class and probability. The
            map explains the logit of the class predicted at that moment.
        `interp_seconds/InputAttribution`: scalar: seconds that this callback took since the last one.
        `interp_errors/InputAttribution`: text, only where it failed and switched itself off.

    Args:
        methods: attributors; when None, `GradCAM()` and `Saliency()` for images that pass through a convolutional
            map, else `Saliency()`.
        samples: how many samples, evenly spread over the validation set.
        probe: a dataset or loader to take them from, instead of the validation set.
        task: how to read a batch and call the model.
        display: how samples are shown.
        on_error: "warn" switches the callback off on its first failure and lets training go on; "raise" raises.

    Raises:
        ValueError, TypeError: an argument is off; always before the first batch.
    """

    def __init__(
        self,
        methods: Sequence[Attributor] | None = None,
        samples: int = 8,
        probe: Any = None,
        task: Task = Task(),
        display: Display = Display(),
        on_error: OnError = "warn",
    ) -> None:
        _check_arguments(methods, samples)
        self.methods = None if methods is None else {tag(method): method for method in methods}
        self.samples = samples
        self.probe = probe
        self.task = task
        self.display = display
        chosen = methods is not None or probe is not None or task != Task()
        self._shell = Shell("InputAttribution", on_error, chosen)
        self._run: _Run | None = None

    @property
    def state_key(self) -> str:
        """Key of the callback in a checkpoint; two instances with other methods get other keys."""
        return self._generate_state_key(methods=None if self.methods is None else list(self.methods))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the layers that methods name, now that the model is configured."""
        for name, method in (self.methods or {}).items():
            layer = getattr(method, "layer", None)
            if isinstance(layer, str):
                match_layers(pl_module, [layer], f"{name}(layer=...)")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the samples, and draw what the untrained network sees in them."""
        folder = run_folder(trainer)
        self._shell.start(partial(self._start, folder), trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the panels of this moment."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._shell.run(self._draw, trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the panels where there is no validation."""
        if not trainer.enable_validation:
            self._shell.run(self._draw, trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the final network's panels once more, and put them into the report."""
        self._shell.run(self._end, trainer, pl_module)

    def _start(self, folder: Folder, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.probe is not None:
            source = Source(given_samples(trainer, self.probe), "given dataset")
        else:
            source = validation_source(trainer, self._shell.owner)
        probe = take_probe(source.samples, self.samples, source.name, self.task)
        task = settled_task(trainer, module, self.task, source.samples)
        inputs = task.inputs(to_device(take(probe.batches[0], 0, 1), device_of(module)))
        methods = self.methods or _fitting(module, inputs, task)
        self._run = _Run(folder, probe, task, with_class_names(self.display, source.samples), methods)
        drawn = self._explain(module, "before training")
        if not trainer.global_step:
            self._log(trainer, drawn)

    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._log(trainer, self._explain(module, f"epoch {trainer.current_epoch + 1}"))

    def _end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        run = begun(self._run)
        groups: dict[str, list[bytes]] = {}
        for name, pixels in self._explain(module, "final network").items():
            method, sample = name.split("/", 1)
            groups.setdefault(method, []).append(png(pixels))
            run.folder.write(f"attribution/{method}-{clean(sample).replace('/', '_')}.png", groups[method][-1])
        write_section(run.folder, "attribution", report.attribution_section(groups, run.probe.source))

    def _log(self, trainer: pl.Trainer, drawn: dict[str, Pixels]) -> None:
        board = Board(trainer.loggers)
        for name, pixels in drawn.items():
            board.image(f"attribution/{name}", pixels, trainer.global_step)

    def _explain(self, module: pl.LightningModule, moment: str) -> dict[str, Pixels]:
        """Return `method/sample` → panel."""
        run = begun(self._run)
        drawn: dict[str, Pixels] = {}
        ids = list(run.probe.ids)
        for batch in run.probe.batches:
            held = to_device(batch, device_of(module))
            with torch.no_grad():
                outputs = run.task.outputs(module, run.task.inputs(held))
            shown = shown_samples(held, outputs, run.task, [ids.pop(0) for _ in range(size(held))], run.display)
            kind = run.task.problem(outputs, targets_of(held, run.task))
            target = predicted(outputs, kind)[0]
            for name, method in run.methods.items():
                found = method(module, run.task.inputs(held), target, task=run.task)
                where = f" at {found.layer}" if found.layer else ""
                for place, sample in enumerate(shown):
                    what = _explained(kind, outputs, int(target[place]), run.display)
                    title = f"{name} of {what}{where}, {moment}"
                    panel = panels.attribution_panel(sample, found.maps[place], title, run.display)
                    drawn[f"{name}/{sample.id}"] = panel
        return drawn


def _explained(kind: Problem | None, outputs: Tensor, target: int, display: Display) -> str:
    """Return what the map explains, in words: a class, or an output of a regression."""
    if kind != "regression":
        return display.label(torch.tensor(target))
    return "the output" if outputs[0].numel() == 1 else f"output {target}"


def _fitting(module: pl.LightningModule, inputs: Any, task: Task) -> dict[str, Attributor]:
    """Return the default methods that work on one sample: Grad-CAM only where images pass a convolutional map."""
    methods: dict[str, Attributor] = {"Saliency": Saliency()}
    if kind_of(row(inputs, 0)) == "image":
        methods = {"GradCAM": GradCAM(), **methods}
    working, reasons = {}, []
    for name, method in methods.items():
        try:
            found = method(module, inputs, lambda outputs: outputs.reshape(len(outputs), -1)[:, 0], task=task)
        except (ValueError, RuntimeError) as error:
            reasons.append(f"{name}: {error}")
        else:
            working[name] = GradCAM(found.layer) if isinstance(method, GradCAM) else method
    if not working:
        raise ValueError("; ".join(reasons))
    for reason in reasons:
        rank_zero_info(f"InputAttribution leaves a method out: {reason}")
    return working


def _check_arguments(methods: Any, samples: Any) -> None:
    owner = "InputAttribution"
    if methods is not None:
        if not isinstance(methods, (list, tuple)) or not methods:
            raise TypeError(f"{owner}(methods=...): expected a list of attributors or None, got {methods!r}")
        for method in methods:
            if isinstance(method, type) or not callable(method):
                raise TypeError(f"{owner}(methods=...): expected attributors such as Saliency(), got {method!r}")
        names = [tag(method) for method in methods]
        if len(set(names)) < len(names):
            raise ValueError(f"{owner}(methods=...): expected each method once, got {', '.join(names)}")
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise ValueError(f"{owner}(samples=...): expected a whole number from 1, got {samples!r}")
