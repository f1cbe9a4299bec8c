"""What `DataInfluence` may be given: each check names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

from lightning_interp.callbacks.influence.spot_checks import check_retrain
from lightning_interp.checks import check_count, dataset_in_words


def check_arguments(queries: Any, top: Any, estimator: Any, budget_seconds: Any, retrain: Any, weights: Any) -> None:
    """Raise unless every argument can be used."""
    owner = "DataInfluence"
    if weights not in ("last", "best"):
        raise ValueError(f'{owner}(weights=...): expected "last" or "best", got {weights!r}')
    for name, value in (("queries", queries), ("top", top)):
        check_count(owner, name, value)
    if estimator is not None and (isinstance(estimator, type) or not callable(estimator)):
        raise TypeError(f"{owner}(estimator=...): expected an estimator such as InfluenceFunction(), got {estimator!r}")
    check_retrain(owner, retrain)
    if budget_seconds is not None and not (isinstance(budget_seconds, (int, float)) and budget_seconds > 0):
        raise ValueError(f"{owner}(budget_seconds=...): expected seconds above 0 or None, got {budget_seconds!r}")


def changed_arguments(train_dataset: Any, query_dataset: Any, weights: str, retrain: Any) -> dict[str, str]:
    """Return those that differ from the defaults, in words that are the same in a resumed run.

    The key of the callback's state in a checkpoint contains them, so that two instances that differ in one of them can
    stand in one trainer.
    """
    in_words = {
        "train_dataset": dataset_in_words(train_dataset),
        "query_dataset": dataset_in_words(query_dataset),
        "weights": None if weights == "last" else weights,
        "retrain": None if retrain is None else getattr(retrain, "__qualname__", str(retrain)),
    }
    return {name: words for name, words in in_words.items() if words is not None}
