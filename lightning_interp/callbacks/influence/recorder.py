"""Records, while training runs, how far its optimizers went along each parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_interp.influence.trajectory import Path, Trajectory, rate_of

Group = dict[str, Any]


class Recorder:
    """Adds up the learning rates of each parameter, step by step, and reads the optimizers' state at the end.

    A step costs a walk over the optimizer's parameters in Python, and no work on tensors; only a learning rate that is
    itself a tensor on an accelerator is waited for. A parameter counts a step where it has a gradient: what is frozen
    for a while does not move. Steps that a gradient scaler skips for an overflow are counted though they moved
    nothing. In manual optimization the steps through `self.optimizers()` are seen, no others. Every rank counts the
    same.
    """

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}
        self._rate_sums: dict[str, float] = {}
        self._names: dict[Tensor, str] = {}

    @property
    def steps(self) -> int:
        """The most steps that any parameter took."""
        return max(self._steps.values(), default=0)

    def step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Count one step; to be called in `on_before_optimizer_step`."""
        for group in optimizer.param_groups:
            rate = rate_of(group)
            for parameter in group["params"]:
                if parameter.grad is not None and (name := self._name(parameter, module)):
                    self._steps[name] = self._steps.get(name, 0) + 1
                    self._rate_sums[name] = self._rate_sums.get(name, 0.0) + rate

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> Trajectory:
        """Return what was recorded; to be called in `on_train_end`, while the optimizers still have their state."""
        groups = _groups_of_parameters(trainer.optimizers)
        path_or_reason: dict[Tensor, Path | str] = {}
        for name, parameter in module.named_parameters():
            if name in self._steps:
                path_or_reason[parameter] = self._path(name, parameter, groups.get(parameter, []))
        # A tied parameter has several names, and its path belongs to each of them.
        all_names = module.named_parameters(remove_duplicate=False)
        by_name = {name: path_or_reason[p] for name, p in all_names if p in path_or_reason}
        paths = {name: path for name, path in by_name.items() if isinstance(path, Path)}
        return Trajectory(paths, {name: reason for name, reason in by_name.items() if isinstance(reason, str)})

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold so that a resumed run continues the sums."""
        return {"steps": dict(self._steps), "rate_sums": dict(self._rate_sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's sums."""
        self._steps, self._rate_sums, self._names = dict(state["steps"]), dict(state["rate_sums"]), {}

    def _name(self, parameter: Tensor, module: nn.Module) -> str:
        """Return a parameter's name, empty where the module has none for it."""
        if parameter not in self._names:
            self._learn_names(module)
        return self._names.setdefault(parameter, "")

    def _learn_names(self, module: nn.Module) -> None:
        """Learn the names of all parameters; one that replaces another, as in another module, starts anew."""
        before = {name: parameter for parameter, name in self._names.items()}
        for name, parameter in module.named_parameters():
            if before.get(name, parameter) is not parameter:
                self._names[before[name]] = ""
                self._steps.pop(name, None)
                self._rate_sums.pop(name, None)
            self._names[parameter] = name

    def _path(self, name: str, parameter: Tensor, groups: list[tuple[Optimizer, Group]]) -> Path | str:
        """Return how a parameter was trained, or why that is not known."""
        if not groups:
            return "the optimizer that trained it was gone at the end"
        if len(groups) > 1:
            return "several optimizers trained it"
        optimizer, group = groups[0]
        try:
            return Path.of(optimizer, group, parameter, self._steps[name], self._rate_sums[name])
        except ValueError as error:
            return f"{type(optimizer).__name__}: {error}"


def _groups_of_parameters(optimizers: list[Optimizer]) -> dict[Tensor, list[tuple[Optimizer, Group]]]:
    """Return for each parameter the optimizers, and their groups, that hold it."""
    groups: dict[Tensor, list[tuple[Optimizer, Group]]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                groups.setdefault(parameter, []).append((optimizer, group))
    return groups
