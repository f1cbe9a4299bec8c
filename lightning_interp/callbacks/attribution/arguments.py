"""Checks of `InputAttribution`'s arguments, made before training starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning_interp.checks import check_count, tag

ATTRIBUTION = "InputAttribution"
Choice = Literal["predicted", "label"] | int | Callable[[Any], Any]


def check_methods(methods: Any) -> None:
    """Raise unless these are attributors, each once."""
    if methods is None:
        return
    if not isinstance(methods, (list, tuple)) or not methods:
        raise TypeError(f"{ATTRIBUTION}(methods=...): expected a list of attributors or None, got {methods!r}")
    for method in methods:
        if isinstance(method, type) or not callable(method):
            raise TypeError(f"{ATTRIBUTION}(methods=...): expected attributors such as Saliency(), got {method!r}")
    names = [tag(method) for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"{ATTRIBUTION}(methods=...): expected each method once, got {', '.join(names)}")


def check_target(target: Any, classes: Any) -> None:
    """Raise unless `target` and `classes` are valid and fit each other."""
    whole = isinstance(target, int) and not isinstance(target, bool) and target >= 0
    if not (whole or callable(target) or target in ("predicted", "label")):
        raise ValueError(
            f'{ATTRIBUTION}(target=...): expected "predicted", "label", a class index, or a function from outputs to'
            f" one number per sample, got {target!r}"
        )
    check_count(ATTRIBUTION, "classes", classes)
    if classes > 1 and target != "predicted":
        raise ValueError(f'{ATTRIBUTION}(classes={classes}): expected target="predicted" with it, got {target!r}')


def check_truth(truth: Any, budget_mb: Any) -> None:
    """Raise unless the truth is a function, and the budget a positive number."""
    if truth is not None and not callable(truth):
        raise TypeError(f"{ATTRIBUTION}(truth=...): expected a function from a batch to masks or boxes, got {truth!r}")
    if not isinstance(budget_mb, (int, float)) or isinstance(budget_mb, bool) or not budget_mb > 0:
        raise ValueError(f"{ATTRIBUTION}(budget_mb=...): expected a positive number, got {budget_mb!r}")
