"""Two or more runs compared, layer by layer, from their stored snapshots."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from lightning_interp.checks import tag
from lightning_interp.similarity import CKA, SVCCA, AnyMeasure, matrix
from lightning_interp.similarity.history import by_chance, cautions, is_distance, is_own_scale, with_reliability
from lightning_interp.similarity.matrix import needs
from lightning_interp.similarity.results import SimilarityMap, Snapshot
from lightning_interp.storage.folder import Folder
from lightning_interp.storage.snapshots import SnapshotStore, open_store

RunPath = str | PathLike[str]
# Where a run's snapshots are, from the folder that the user names: that folder itself, `interp`, or the log folder.
SNAPSHOT_FOLDERS = ("", "similarity", "interp/similarity")
DEFAULT_MEASURES: tuple[AnyMeasure, ...] = (CKA(debiased=True), CKA(), SVCCA())


@dataclass(frozen=True, eq=False)
class Comparison:
    """The result of `compare`.

    Args:
        runs: name of each run.
        maps: measure → one table per pair of runs, layers of the first × layers of the second, in the order of `pairs`.
        pairs: indices into `runs`, the earlier run first.
        left_out: default measures that the snapshots of some run hold too little for.
    """

    runs: tuple[str, ...]
    maps: dict[str, list[SimilarityMap]]
    pairs: tuple[tuple[int, int], ...]
    left_out: tuple[str, ...] = ()

    def same_layers(self, measure: str) -> dict[str, list[float]]:
        """Return layer → its similarity in each pair of runs, for the layers that all runs have."""
        tables = self.maps[measure]
        shared = [layer for layer in tables[0].rows if all(layer in t.rows and layer in t.columns for t in tables)]
        return {
            layer: [float(t.values[t.rows.index(layer), t.columns.index(layer)]) for t in tables] for layer in shared
        }

    def correspondence(self, measure: str) -> float:
        """Return how often a layer's most similar layer in another run is the layer of the same name.

        The share over all layers, pairs and both directions, in [0, 1]; layers without a value of their own are left
        out. NaN where no layer is left.

        Reference: the sanity check of Kornblith et al. 2019, section 6.1.
        """
        hits: list[bool] = []
        for table in self.maps[measure]:
            for rows, columns, values in (
                (table.rows, table.columns, table.values),
                (table.columns, table.rows, table.values.T),
            ):
                # An undefined value must not win: it is made the least similar of its row.
                comparable = values.nan_to_num(nan=torch.inf if table.distance else -torch.inf)
                nearest = comparable.argmin(1) if table.distance else comparable.argmax(1)
                hits += [
                    columns[int(nearest[i])] == row
                    for i, row in enumerate(rows)
                    if row in columns and not values[i, columns.index(row)].isnan()
                ]
        return sum(hits) / len(hits) if hits else float("nan")


def compare(
    *runs: RunPath,
    measures: Sequence[AnyMeasure] | None = None,
    epochs: int | Sequence[int] | None = None,
) -> Comparison:
    """Compare the layers of two or more runs that `RepresentationSimilarity` recorded on the same samples.

    Args:
        runs: each a run's log folder, its `interp` folder or its `similarity` folder; local or an fsspec address.
        measures: `CKA()`, `SVCCA()`, any object with a `name` and `between`, or a function of two `(n, d)` tensors.
            When None, debiased and plain CKA and SVCCA, without those that a run's snapshots hold too little for; a
            warning names them.
        epochs: after how many finished epochs to compare, one number for all runs or one for each; the last snapshot
            when None.

    Raises:
        FileNotFoundError: a run has no snapshots.
        ValueError: there are fewer than two runs, the runs recorded different samples, a run has no snapshot of that
            epoch, or a measure needs singular vectors that a run did not keep. Where a measure needs neurons that
            were not kept, its value is NaN.
    """
    if len(runs) < 2:
        raise ValueError(f"runs: expected at least two, got {len(runs)}")
    stores = [_open_run(run) for run in runs]
    _check_same_probe(runs, stores)
    epoch_per_run = list(epochs) if isinstance(epochs, Sequence) else [epochs] * len(runs)
    if len(epoch_per_run) != len(runs):
        raise ValueError(f"epochs: expected one for each of {len(runs)} runs, got {len(epoch_per_run)}")
    snapshots = [_read_snapshot(store, epoch) for store, epoch in zip(stores, epoch_per_run, strict=True)]
    measures_used, left_out = list(DEFAULT_MEASURES if measures is None else measures), []
    if measures is None:
        left_out = [tag(measure) for measure in DEFAULT_MEASURES if _runs_without_factors(runs, snapshots, measure)]
        measures_used = [measure for measure in DEFAULT_MEASURES if tag(measure) not in left_out]
        if left_out:
            warnings.warn(f"compare: {', '.join(left_out)} left out, for which a run kept too little", stacklevel=2)
    _check_factorable(runs, snapshots, measures_used)
    n = stores[0].manifest["probe"]["n"]
    names, pairs = _short_names(runs), tuple(itertools.combinations(range(len(runs)), 2))
    maps = {
        tag(measure): [_similarity_map(measure, snapshots[a], snapshots[b], names[a], names[b], n) for a, b in pairs]
        for measure in measures_used
    }
    return Comparison(names, maps, pairs, tuple(left_out))


def _similarity_map(
    measure: AnyMeasure, a: Snapshot, b: Snapshot, row_title: str, column_title: str, n: int
) -> SimilarityMap:
    # Snapshots read a layer from disk at each access; here all layers are loaded once, since each is used often.
    a, b = (dataclasses.replace(snapshot, layers=dict(snapshot.layers)) for snapshot in (a, b))
    values = matrix(measure, list(a.layers.values()), list(b.layers.values()))
    title = f"epoch {a.epoch} and epoch {b.epoch}"
    layers = tuple(a.layers), tuple(b.layers)
    distance, note = is_distance(measure), cautions(measure, a, b)
    table = SimilarityMap(tag(measure), title, *layers, values, row_title, column_title, n, note, distance)
    table = dataclasses.replace(with_reliability(table, measure, a, b), own_scale=is_own_scale(measure))
    shared = [layer for layer in table.rows if layer in table.columns]
    if chances := by_chance([_value_at(table, table.chance, layer) for layer in shared]):
        return dataclasses.replace(table, note=f"By chance layers of one name score {chances}. {note}")
    return table


def _check_factorable(runs: Sequence[RunPath], snapshots: Sequence[Snapshot], measures: Sequence[AnyMeasure]) -> None:
    """Raise a ValueError if a measure needs singular vectors of a layer that was stored as a Gram matrix.

    Gram matrices are stored in half precision, whose rounding drowns the small singular values.
    """
    for measure in measures:
        if runs_without := _runs_without_factors(runs, snapshots, measure):
            raise ValueError(
                f"measures: expected kinds of linear CKA, for which alone {runs_without[0]} kept its layers, got"
                f" {tag(measure)}; name it in RepresentationSimilarity(measures=...) when training"
            )


def _runs_without_factors(runs: Sequence[RunPath], snapshots: Sequence[Snapshot], measure: AnyMeasure) -> list[RunPath]:
    """Return the runs whose layers were not all stored in a form that a measure can factor."""
    if needs([measure]) == "gram":
        return []
    pairs = zip(runs, snapshots, strict=True)
    return [run for run, snapshot in pairs if not all(layer.factorable for layer in snapshot.layers.values())]


def _open_run(run: RunPath) -> SnapshotStore:
    root = Folder(str(run))
    if folders := _folders_with_a_manifest(root, SNAPSHOT_FOLDERS):
        return open_store(folders[0])
    nested_folders = [
        folder
        for parent in (root, root.folder("interp"))
        for name in sorted(parent.names("*"))
        for folder in _folders_with_a_manifest(parent.folder(name), SNAPSHOT_FOLDERS[1:])
    ]
    if len(nested_folders) == 1:
        return open_store(nested_folders[0])
    hint = f"; there are {', '.join(folder.path for folder in nested_folders)}" if nested_folders else ", found none"
    raise FileNotFoundError(f"{run}: expected a run with snapshots (interp/similarity/manifest.json){hint}")


def _folders_with_a_manifest(root: Folder, names: Sequence[str]) -> list[Folder]:
    folders = [root.folder(name) if name else root for name in names]
    return [folder for folder in folders if folder.exists("manifest.json")]


def _check_same_probe(runs: Sequence[RunPath], stores: Sequence[SnapshotStore]) -> None:
    first = stores[0].manifest["probe"]
    for run, store in zip(runs, stores, strict=True):
        probe = store.manifest["probe"]
        if probe["fingerprint"] != first["fingerprint"]:
            difference = _difference_in_words(first, probe)
            raise ValueError(
                f"runs: expected snapshots of the same samples; {runs[0]} shows {_probe_in_words(first)},"
                f" {run} {_probe_in_words(probe)}, {difference}; train with the same probe= dataset to compare"
            )
        for argument in ("maps", "tokens"):
            if probe.get(argument) != first.get(argument):
                raise ValueError(
                    f"runs: expected the same {argument}= in RepresentationSimilarity; {runs[0]} has"
                    f" {first.get(argument)!r}, {run} {probe.get(argument)!r}"
                )


def _probe_in_words(probe: dict[str, object]) -> str:
    return f"{probe['n']} of the {probe['source']}"


def _difference_in_words(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Return in words how two probes with different fingerprints differ."""
    ids_of_first, ids_of_second = list(first["ids"]), list(second["ids"])
    if len(ids_of_first) != len(ids_of_second):
        return "another number of samples"
    if ids_of_first == ids_of_second:
        return "the same ids with other values"
    if sorted(ids_of_first) == sorted(ids_of_second):
        return "the same ids in another order"
    return f"other ids, {len(set(ids_of_first) & set(ids_of_second))} of them shared"


def _read_snapshot(store: SnapshotStore, epoch: int | None) -> Snapshot:
    entries = store.manifest["snapshots"]
    steps = [e["step"] for e in entries if epoch is None or e["epoch"] == epoch]
    if not steps:
        epochs = sorted({e["epoch"] for e in entries})
        raise ValueError(f"epochs: expected one of {epochs} for {store.folder.path}, got {epoch}")
    return store.read(steps[-1 if epoch is None else 0])  # the first after `epoch` epochs is nearest to their end


def _short_names(runs: Sequence[RunPath]) -> tuple[str, ...]:
    """Return the parts in which the paths of the runs differ; numbers where they do not."""
    paths = [[p for p in PurePath(str(run)).parts if p not in ("interp", "similarity")] for run in runs]
    for _ in range(2):  # strip what all paths share from the front, then, reversed, from the back
        while all(paths) and len({path[0] for path in paths}) == 1:
            paths = [path[1:] for path in paths]
        paths = [path[::-1] for path in paths]
    names = ["/".join(path) for path in paths]
    return tuple(names) if all(names) and len(set(names)) == len(names) else tuple(map(str, range(1, len(runs) + 1)))


def table_of(comparison: Comparison, measure: str) -> list[list[str]]:
    """Return the similarity of the layers of the same name in each pair of runs, as rows of text.

    A heading, one row per layer, their mean, and the values by chance. A number is followed by its jackknife standard
    error where that is known.
    """
    heading = ["layer", *(f"{comparison.runs[a]} & {comparison.runs[b]}" for a, b in comparison.pairs)]
    tables = comparison.maps[measure]
    values_of_layers = comparison.same_layers(measure)
    rows = [
        [layer, *(_value_in_words(t, layer, value) for t, value in zip(tables, values, strict=True))]
        for layer, values in values_of_layers.items()
    ]
    if values_of_layers:
        columns = zip(*values_of_layers.values(), strict=True)
        rows.append(["mean", *(_mean_in_words(column) for column in columns)])
        rows.append(["by chance", *(_chances_in_words(table, list(values_of_layers)) for table in tables)])
    return [heading, *rows]


def _value_in_words(table: SimilarityMap, layer: str, value: float) -> str:
    error = _value_at(table, table.standard_error, layer)
    return (f"{value:.3f}" if value == value else "–") + (f" ± {error:.3f}" if error == error else "")


def correspondence_in_words(comparison: Comparison, measure: str) -> str:
    """Return in words how often the most similar layer is that of the same name, and over how many layers."""
    share, values_of_layers = comparison.correspondence(measure), comparison.same_layers(measure)
    defined = sum(any(value == value for value in values) for values in values_of_layers.values())
    over = f"{defined} of {len(values_of_layers)} layers with a value"
    return f"most similar layer has the same name: {share:.0%}, over {over}" if share == share else f"{over} to match"


def _mean_in_words(values: Sequence[float]) -> str:
    defined = [value for value in values if value == value]
    if not defined:
        return "not defined"
    of = "" if len(defined) == len(values) else f" ({len(defined)} of {len(values)} layers)"
    return f"{sum(defined) / len(defined):.3f}{of}"


def _chances_in_words(table: SimilarityMap, layers: Sequence[str]) -> str:
    return by_chance([_value_at(table, table.chance, layer) for layer in layers], 3) or "unknown"


def _value_at(table: SimilarityMap, values: Tensor | None, layer: str) -> float:
    cell = table.rows.index(layer), table.columns.index(layer)
    return float("nan") if values is None else float(values[cell])
