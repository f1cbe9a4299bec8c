"""How much of the work on influence fits into the time there is."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch

from lightning_interp.data.samples import Samples
from lightning_interp.influence import InfluenceFunction
from lightning_interp.influence.curvature.curvature import Curvature, decomposition_cost, needs_outputs
from lightning_interp.influence.estimators.default_curvature import weighted_layers
from lightning_interp.influence.estimators.prepared import PreparedInfluence
from lightning_interp.influence.gradients.coverage import Coverage
from lightning_interp.influence.gradients.distributed import Ranks
from lightning_interp.influence.gradients.ggn_columns import hessian_root
from lightning_interp.influence.gradients.reader import SINGLE_PROCESS
from lightning_interp.network.undisturbed import differentiable
from lightning_interp.progress import quiet

Item = TypeVar("Item")
SMALLEST_TRIAL = 2  # samples: a cost per sample can be estimated from no fewer
LARGEST_TRIAL = 40  # samples: also the fewest that a budget cuts to
TRIAL_SHARE = 0.1  # of the budget: what finding out may cost
TIMED_SIDE = 256  # of the matrix whose decomposition is timed, in milliseconds
FORWARD_PASS = "curvature, columns"  # how `Reader` names the one pass whose cost grows with the samples


class Stopwatch:
    """A `Progress` that shows nothing and adds up the seconds spent on each kind of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, items: Iterable[Item], total: int, what: str) -> Iterable[Item]:
        """Yield the items, and time from the first to the end."""
        started = time.perf_counter()
        yield from items
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    def of(self, start: str) -> float:
        """Return the seconds of all work whose name starts so."""
        return sum(spent for what, spent in self.seconds.items() if what.startswith(start))


def afford_curvature(
    estimator: InfluenceFunction,
    prepare: Callable[[InfluenceFunction], PreparedInfluence],
    seconds: float,
    ranks: Ranks = SINGLE_PROCESS,
) -> tuple[PreparedInfluence, str]:
    """Prepare an estimator, cut to what takes about `seconds` to fit; rank zero decides for all.

    It is cut to the last layer where decomposing the curvature alone would take too long, and its curvature to fewer
    samples, by the time of a fit on a few. Coverage is searched once, and once more for the last layer alone.

    Args:
        estimator: that will be fitted.
        prepare: calls `InfluenceFunction.prepare` with the network and all training samples.
        seconds: the budget; infinite for no limit.
        ranks: the processes that share the work; all call this.

    Returns:
        Ready to fit; and what was cut, in words, empty if nothing.
    """
    prepared, message = prepare(estimator), ""
    if len(prepared.train) <= LARGEST_TRIAL or math.isinf(seconds):
        return prepared, message
    if estimator.layers is None:
        layer = ranks.gather(_layer_to_cut_to(prepared, seconds))[0]
        if layer is not None:
            prepared = prepare(dataclasses.replace(estimator, layers=[layer]))
            message = f"only the parameters of {layer} enter: the curvature of all layers would take too long."
    count = ranks.gather(_affordable_samples(prepared, seconds))[0]
    if count is not None:
        fewer = dataclasses.replace(cast(Any, prepared.curvature), samples=count)
        prepared = dataclasses.replace(prepared, curvature=fewer)
    return prepared, message


def afford_scores(score: Callable[[Sequence[int]], float], train: Samples, seconds: float) -> Sequence[int] | None:
    """Score a few samples, and return positions of as many as can be scored in `seconds`; None for all.

    Args:
        score: positions in the training set → the seconds that scoring them took.
        train: all training samples.
        seconds: the budget; infinite for no limit.
    """
    n = len(train)
    if n <= LARGEST_TRIAL or math.isinf(seconds):
        return None
    started = time.perf_counter()
    # A first trial on very few samples, only to choose the size of the two that are compared.
    score(train.spread_indices(SMALLEST_TRIAL))
    size = _trial_size((time.perf_counter() - started) / SMALLEST_TRIAL, seconds)
    # The difference of two trials cancels costs that do not grow with the samples, such as solving for the queries.
    per_sample = max(1e-9, (score(train.spread_indices(2 * size)) - score(train.spread_indices(size))) / size)
    count = min(n, max(LARGEST_TRIAL, int((seconds - (time.perf_counter() - started)) / per_sample)))
    return None if count == n else train.spread_indices(count)


def _layer_to_cut_to(prepared: PreparedInfluence, seconds: float) -> str | None:
    """Return the last layer where decomposing the curvature of all would take too long, else None."""
    layers = weighted_layers(prepared.coverage.model)
    if not layers or _decomposition_seconds(prepared.curvature, prepared.coverage) <= TRIAL_SHARE * seconds:
        return None
    return layers[-1]


def _affordable_samples(prepared: PreparedInfluence, seconds: float) -> int | None:
    """Return from how many samples the curvature can be estimated in about `seconds`; None for as many as it is.

    One fit on a few samples is timed. A pass over all samples costs by the sample; where columns are sampled, what
    follows costs by the column, and so the same for all samples.
    """
    curvature = prepared.curvature
    if not _is_subsampled(curvature):
        return None
    watch = Stopwatch()
    try:
        trial = prepared.train.spread(_trial_size(_seconds_per_sample(prepared), seconds))
        reader = dataclasses.replace(prepared.reader, progress=watch, ranks=SINGLE_PROCESS)
        dataclasses.replace(prepared, reader=reader, train=trial).fit()
    except (ValueError, FloatingPointError):  # a few samples may have no curvature; all may
        return None
    per_sample, fixed = watch.of(FORWARD_PASS) / len(trial), watch.of("curvature") - watch.of(FORWARD_PASS)
    if getattr(curvature, "columns", None) is None:
        per_sample, fixed = per_sample + fixed / len(trial), 0.0
    whole = min(len(prepared.train), cast(Any, curvature).samples or len(prepared.train))
    count = min(whole, max(LARGEST_TRIAL, int((seconds - fixed) / max(1e-9, per_sample))))
    return None if count == whole else count


def _is_subsampled(curvature: object) -> bool:
    """Say whether a curvature can be copied with another number of samples: they are a field of a dataclass."""
    return dataclasses.is_dataclass(curvature) and "samples" in {field.name for field in dataclasses.fields(curvature)}


def _seconds_per_sample(prepared: PreparedInfluence) -> float:
    """Return about how long one sample takes in a fit: a backward for each column of its curvature."""
    reader, task, columns = dataclasses.replace(prepared.reader, progress=quiet), prepared.coverage.task, 1
    started = time.perf_counter()
    with differentiable(prepared.coverage.model):
        for batch in reader.per_sample_gradients(prepared.train.spread(SMALLEST_TRIAL), "trial"):
            batch.loss_gradients()
            if needs_outputs(prepared.curvature):
                columns = hessian_root(batch.outputs, batch.targets, task, torch.Generator()).norms.shape[1]
    return (time.perf_counter() - started) * columns / SMALLEST_TRIAL


def _trial_size(per_sample: float, seconds: float) -> int:
    """Return how many samples a trial may take."""
    return int(min(LARGEST_TRIAL, max(SMALLEST_TRIAL, TRIAL_SHARE * seconds / max(1e-9, per_sample))))


def _decomposition_seconds(curvature: Curvature, coverage: Coverage) -> float:
    """Estimate how long the eigenvectors of all layers' factors take, from those of one small matrix."""
    cost = decomposition_cost(curvature, coverage.blocks.values())
    if not cost:
        return 0.0
    matrix = torch.eye(TIMED_SIDE, dtype=torch.float64) + 1
    torch.linalg.eigh(matrix)  # the first call of a process also loads the library
    started = time.perf_counter()
    torch.linalg.eigh(matrix)
    return cost * (time.perf_counter() - started) / TIMED_SIDE**3
