"""Two or more runs compared, layer by layer, from their stored snapshots."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import PurePath

import torch
from torch import Tensor

from lightning_interp.board import tag
from lightning_interp.records import SimilarityMap, Snapshot
from lightning_interp.similarity import CKA, SVCCA, AnyMeasure, matrix
from lightning_interp.similarity.history import cautions, is_distance, with_doubt
from lightning_interp.similarity.matrix import needs
from lightning_interp.storage import Folder, SnapshotStore, open_store

Run = str | PathLike[str]
PLACES = ("", "similarity", "interp/similarity")


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found.

    Args:
        runs: name of each run.
        maps: measure → one table per pair of runs, layers of the one × layers of the other, in the order of `pairs`.
        pairs: indices into `runs`, the earlier first.
    """

    runs: tuple[str, ...]
    maps: dict[str, list[SimilarityMap]]
    pairs: tuple[tuple[int, int], ...]

    def same_layers(self, measure: str) -> dict[str, list[float]]:
        """Return layer → similarity of that layer in each pair of runs; layers that all pairs have."""
        tables = self.maps[measure]
        shared = [layer for layer in tables[0].rows if all(layer in t.rows and layer in t.columns for t in tables)]
        return {
            layer: [float(t.values[t.rows.index(layer), t.columns.index(layer)]) for t in tables] for layer in shared
        }

    def correspondence(self, measure: str) -> float:
        """Return how often a layer's most similar layer in another run is the layer of the same name.

        Over all layers, pairs and both directions, in [0, 1]; layers whose own value is not defined are left out, NaN
        where no layer is left.

        Reference: the sanity check of Kornblith et al. 2019, section 6.1.
        """
        hits: list[bool] = []
        for table in self.maps[measure]:
            for rows, columns, values in (
                (table.rows, table.columns, table.values),
                (table.columns, table.rows, table.values.T),
            ):
                known = values.nan_to_num(nan=torch.inf if table.distance else -torch.inf)
                best = known.argmin(1) if table.distance else known.argmax(1)
                hits += [
                    columns[int(best[i])] == row
                    for i, row in enumerate(rows)
                    if row in columns and not values[i, columns.index(row)].isnan()
                ]
        return sum(hits) / len(hits) if hits else float("nan")


def compare(
    *runs: Run,
    measures: Sequence[AnyMeasure] = (CKA(debiased=True), CKA(), SVCCA()),
    epochs: int | Sequence[int] | None = None,
) -> Comparison:
    """Compare the layers of two or more runs that `RepresentationSimilarity` recorded on the same samples.

    Args:
        runs: each a run's log folder, its `interp` folder or its `similarity` folder; local or an fsspec address.
        measures: `CKA()`, `SVCCA()`, any with a `name` and `between`, or a function of two `(n, d)` tensors.
        epochs: the epoch to take, one for all runs or one for each; the last snapshot when None.

    Raises:
        FileNotFoundError: a run has no snapshots.
        ValueError: fewer than two runs, different samples, an epoch that a run does not have, or a measure that
            needs singular vectors where a run kept none. Where neurons are needed and were not kept, the value is NaN.
    """
    if len(runs) < 2:
        raise ValueError(f"runs: expected at least two, got {len(runs)}")
    stores = [_open(run) for run in runs]
    _same_probe(runs, stores)
    wanted = list(epochs) if isinstance(epochs, Sequence) else [epochs] * len(runs)
    if len(wanted) != len(runs):
        raise ValueError(f"epochs: expected one for each of {len(runs)} runs, got {len(wanted)}")
    snapshots = [_snapshot(store, epoch) for store, epoch in zip(stores, wanted, strict=True)]
    _enough_kept(runs, snapshots, measures)
    n = stores[0].manifest["probe"]["n"]
    names, pairs = _names(runs), tuple(itertools.combinations(range(len(runs)), 2))
    maps = {
        tag(measure): [_table(measure, snapshots[a], snapshots[b], names[a], names[b], n) for a, b in pairs]
        for measure in measures
    }
    return Comparison(names, maps, pairs)


def _table(measure: AnyMeasure, a: Snapshot, b: Snapshot, row_title: str, column_title: str, n: int) -> SimilarityMap:
    a, b = (dataclasses.replace(snapshot, layers=dict(snapshot.layers)) for snapshot in (a, b))
    values = matrix(measure, list(a.layers.values()), list(b.layers.values()))
    title = f"epoch {a.epoch} and epoch {b.epoch}"
    layers = tuple(a.layers), tuple(b.layers)
    note = "; ".join(dict.fromkeys(said for snapshot in (a, b) if (said := cautions(measure, snapshot))))
    distance = is_distance(measure)
    table = SimilarityMap(tag(measure), title, *layers, values, row_title, column_title, n, note, distance)
    return with_doubt(table, measure, a, b)


def _enough_kept(runs: Sequence[Run], snapshots: Sequence[Snapshot], measures: Sequence[AnyMeasure]) -> None:
    """Raise a ValueError where a measure asks for singular vectors, of which half precision leaves too little."""
    for measure in measures:
        for run, snapshot in zip(runs, snapshots, strict=True):
            if needs([measure]) != "gram" and not all(layer.factorable for layer in snapshot.layers.values()):
                raise ValueError(
                    f"measures: expected kinds of linear CKA, for which alone {run} kept its layers, got"
                    f" {tag(measure)}; name it in RepresentationSimilarity(measures=...) when training"
                )


def _open(run: Run) -> SnapshotStore:
    for place in PLACES:
        folder = Folder(str(run)).folder(place) if place else Folder(str(run))
        if folder.exists("manifest.json"):
            return open_store(folder)
    raise FileNotFoundError(f"{run}: expected a run with snapshots (interp/similarity/manifest.json), found none")


def _same_probe(runs: Sequence[Run], stores: Sequence[SnapshotStore]) -> None:
    first = stores[0].manifest["probe"]
    for run, store in zip(runs, stores, strict=True):
        probe = store.manifest["probe"]
        if probe["fingerprint"] != first["fingerprint"]:
            raise ValueError(
                f"runs: expected snapshots of the same samples; {runs[0]} shows {_told(first)}, {run} {_told(probe)},"
                " with other values; train with the same probe= dataset to compare"
            )
        for choice in ("maps", "tokens"):
            if probe.get(choice) != first.get(choice):
                raise ValueError(
                    f"runs: expected the same {choice}= in RepresentationSimilarity; {runs[0]} has"
                    f" {first.get(choice)!r}, {run} {probe.get(choice)!r}"
                )


def _told(probe: dict[str, object]) -> str:
    return f"{probe['n']} of the {probe['source']}"


def _snapshot(store: SnapshotStore, epoch: int | None) -> Snapshot:
    entries = store.manifest["snapshots"]
    found = [e["step"] for e in entries if epoch is None or e["epoch"] == epoch]
    if not found:
        there = sorted({e["epoch"] for e in entries})
        raise ValueError(f"epochs: expected one of {there} for {store.folder.path}, got {epoch}")
    return store.read(found[-1])


def _names(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the parts of the paths that tell the runs apart; numbers where nothing does."""
    parts = [[p for p in PurePath(str(run)).parts if p not in ("interp", "similarity")] for run in runs]
    for _ in range(2):  # strip what all have in common, from the front, then from the back
        while all(parts) and len({part[0] for part in parts}) == 1:
            parts = [part[1:] for part in parts]
        parts = [part[::-1] for part in parts]
    names = ["/".join(part) for part in parts]
    return tuple(names) if all(names) and len(set(names)) == len(names) else tuple(map(str, range(1, len(runs) + 1)))


def table_of(comparison: Comparison, measure: str) -> list[list[str]]:
    """Return the similarity of each layer in each pair of runs as rows of text: a heading, layers, their mean, chance.

    A number is followed by its jackknife standard error where that is known.
    """
    heading = ["layer", *(f"{comparison.runs[a]} & {comparison.runs[b]}" for a, b in comparison.pairs)]
    tables = comparison.maps[measure]
    same = comparison.same_layers(measure)
    rows = [
        [layer, *(_cell(t, layer, value) for t, value in zip(tables, values, strict=True))]
        for layer, values in same.items()
    ]
    if same:
        means = torch.tensor(list(same.values())).mean(0).tolist()
        rows.append(["mean", *(f"{value:.3f}" for value in means)])
        rows.append(["by chance", *(_chances(table, list(same)) for table in tables)])
    return [heading, *rows]


def _cell(table: SimilarityMap, layer: str, value: float) -> str:
    error = _at(table, table.standard_error, layer)
    return f"{value:.3f}" + (f" ± {error:.3f}" if error == error else "")


def _chances(table: SimilarityMap, layers: Sequence[str]) -> str:
    known = [value for layer in layers if (value := _at(table, table.chance, layer)) == value]
    if not known:
        return "unknown"
    low, high = f"{min(known):.3f}", f"{max(known):.3f}"
    return low if low == high else f"{low} to {high}"


def _at(table: SimilarityMap, values: Tensor | None, layer: str) -> float:
    place = table.rows.index(layer), table.columns.index(layer)
    return float("nan") if values is None else float(values[place])
