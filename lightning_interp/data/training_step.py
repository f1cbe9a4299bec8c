"""A module's own training step as a loss, run so that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

MUTED_METHODS = ("log", "log_dict")
MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))  # torch's own, such as the dict of parameters


def loss_of_training_step(module: nn.Module, batch: Any) -> Tensor:
    """Return the loss that `module.training_step(batch, 0)` gives.

    `self.log` and `self.log_dict` do nothing meanwhile. The module's attributes (lists, dictionaries, counters, states
    of torchmetrics) are restored afterwards; what the step writes elsewhere is not undone.

    Args:
        module: a LightningModule, in the mode that the caller chose.
        batch: on its device.

    Raises:
        TypeError: the module has no training step.
        ValueError: the module optimises manually, or its step gives no single loss.
    """
    step = getattr(module, "training_step", None)
    if not callable(step):
        raise TypeError(f"Task.from_training_step(): expected a module with training_step, got {type(module).__name__}")
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(
            f"Task.from_training_step(): expected automatic optimization, {type(module).__name__} optimises manually:"
            " its step has no one loss; pass task=Task(loss=...)"
        )
    with _attributes_restored(module):
        result = step(batch, 0) if _takes_index(step) else step(batch)
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"Task.from_training_step(): expected training_step to return one loss, got {got}")
    return loss.reshape(())


@contextlib.contextmanager
def _attributes_restored(module: nn.Module) -> Iterator[None]:
    """Restore every attribute of the module and its metrics afterwards; nothing is logged meanwhile."""
    stateful = [
        (submodule, dict(vars(submodule)))
        for submodule in module.modules()
        if submodule is module or _has_state(submodule)
    ]
    try:
        for submodule, attributes in stateful:
            # The step works on copies, as it may change lists and tensors in place.
            copies = {name: _copy(value) for name, value in attributes.items() if name not in MODULE_ATTRIBUTES}
            vars(submodule).update(copies)
            vars(submodule).update({name: _nothing for name in MUTED_METHODS if hasattr(submodule, name)})
        yield
    finally:
        for submodule, attributes in stateful:
            vars(submodule).clear()
            vars(submodule).update(attributes)


def _has_state(module: nn.Module) -> bool:
    """Say whether a module is a metric or a LightningModule, whose attributes a step may change."""
    return isinstance(module, (Metric, MetricCollection)) or all(hasattr(module, name) for name in MUTED_METHODS)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return copy.copy(value) if isinstance(value, (list, dict, set)) else value


def _nothing(*_: Any, **__: Any) -> None:
    """Log nothing."""


def _takes_index(step: Callable[..., Any]) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(step).parameters.values()]
    positional = [
        kind for kind in kinds if kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    return len(positional) > 1 or inspect.Parameter.VAR_POSITIONAL in kinds
