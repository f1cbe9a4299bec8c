"""What `RepresentationSimilarity` may be given: each check names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_interp.checks import check_count, tag
from lightning_interp.similarity import AnyMeasure
from lightning_interp.similarity.matrix import needs
from lightning_interp.storage.snapshots import SnapshotStore

FEWEST_SAMPLES = 4
SIMILARITY = "RepresentationSimilarity"


def check_layer_patterns(layers: Any) -> None:
    """Raise where layers are no list of names or patterns."""
    if layers is not None and (isinstance(layers, str) or not all(isinstance(layer, str) for layer in layers)):
        raise TypeError(f"{SIMILARITY}(layers=...): expected a list of names or patterns, got {layers!r}")
    if layers is not None and not list(layers):
        raise ValueError(f"{SIMILARITY}(layers=...): expected at least one name or pattern, or None; got none")


def check_measures(measures: Any) -> None:
    """Raise where measures are no list of what two layers can be compared by, each once."""
    if not isinstance(measures, (list, tuple)) or not measures:
        raise TypeError(f"{SIMILARITY}(measures=...): expected a list of at least one measure, got {measures!r}")
    for measure in measures:
        if isinstance(measure, type) or not (callable(measure) or callable(getattr(measure, "between", None))):
            raise TypeError(
                f"{SIMILARITY}(measures=...): expected measures such as CKA() or functions of two tensors, got"
                f" {measure!r}"
            )
    names = [tag(measure) for measure in measures]
    if len(set(names)) < len(names):
        raise ValueError(f"{SIMILARITY}(measures=...): expected each measure once, got {', '.join(names)}")


def checked_sketch(sketch: int | None, measures: Sequence[AnyMeasure], store: str) -> int | None:
    """Return the size of sketches; raise where a measure or the storage has no use for them."""
    if sketch is not None:
        check_count(SIMILARITY, "sketch", sketch, 64)
        if needs(measures) != "gram" or store != "compact":
            raise ValueError(
                f'{SIMILARITY}(sketch=...): expected kinds of linear CKA as measures, and store="compact", got'
                f" {', '.join(map(tag, measures))} and store={store!r}"
            )
    return sketch


def how_often(epochs: int | None, steps: int | None) -> tuple[int | None, int | None]:
    """Return every how many epochs and steps; exactly one of the two is given then."""
    for name, value in (("every_n_epochs", epochs), ("every_n_steps", steps)):
        if value is not None:
            check_count(SIMILARITY, name, value)
    if epochs is not None and steps is not None:
        raise ValueError(f"{SIMILARITY}(every_n_steps=...): expected it or every_n_epochs=, got both")
    return (1 if steps is None else None) if epochs is None else epochs, steps


def warn_beyond_budget(budget_mb: float, store: SnapshotStore) -> None:
    """Warn where the first and the last snapshot, which always stay, will take more than the budget."""
    least = 2 * store.manifest["snapshots"][0]["bytes"] / 1e6
    if least > budget_mb:
        rank_zero_warn(
            f"{SIMILARITY}: the first and the last snapshot alone take {least:.2g} MB, more than"
            f" budget_mb={budget_mb:g}; they stay"
        )


def check_storage(store: Any, budget_mb: Any) -> None:
    """Raise where it is not said what to keep, or within which budget."""
    if store not in ("compact", "activations"):
        raise ValueError(f'{SIMILARITY}(store=...): expected "compact" or "activations", got {store!r}')
    if isinstance(budget_mb, bool) or not isinstance(budget_mb, (int, float)) or not budget_mb > 0:
        raise ValueError(f"{SIMILARITY}(budget_mb=...): expected a positive number, got {budget_mb!r}")
