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
PLACES = ("", "similarity", "interp/similarity")
DEFAULT: tuple[AnyMeasure, ...] = (CKA(debiased=True), CKA(), SVCCA())


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found.

    Args:
        runs: name of each run.
        maps: measure → one table per pair of runs, layers of the one × layers of the other, in the order of `pairs`.
        pairs: indices into `runs`, the earlier first.
        left_out: measures that were not asked for by name, and that the runs did not keep enough for.
    """

    runs: tuple[str, ...]
    maps: dict[str, list[SimilarityMap]]
    pairs: tuple[tuple[int, int], ...]
    left_out: tuple[str, ...] = ()

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
    *runs: RunPath,
    measures: Sequence[AnyMeasure] | None = None,
    epochs: int | Sequence[int] | None = None,
) -> Comparison:
    """Compare the layers of two or more runs that `RepresentationSimilarity` recorded on the same samples.

    Args:
        runs: each a run's log folder, its `interp` folder or its `similarity` folder; local or an fsspec address.
        measures: `CKA()`, `SVCCA()`, any with a `name` and `between`, or a function of two `(n, d)` tensors. When None,
            debiased and plain CKA and SVCCA, less those that the runs did not keep enough for, which is said.
        epochs: the number of finished epochs to compare after, one for all runs or one for each; the last snapshot when
            None.

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
    chosen, left_out = list(DEFAULT if measures is None else measures), []
    if measures is None:
        left_out = [tag(measure) for measure in DEFAULT if _too_little(runs, snapshots, measure)]
        chosen = [measure for measure in DEFAULT if tag(measure) not in left_out]
        if left_out:
            warnings.warn(f"compare: {', '.join(left_out)} left out, for which a run kept too little", stacklevel=2)
    _enough_kept(runs, snapshots, chosen)
    n = stores[0].manifest["probe"]["n"]
    names, pairs = _names(runs), tuple(itertools.combinations(range(len(runs)), 2))
    maps = {
        tag(measure): [_table(measure, snapshots[a], snapshots[b], names[a], names[b], n) for a, b in pairs]
        for measure in chosen
    }
    return Comparison(names, maps, pairs, tuple(left_out))


def _table(measure: AnyMeasure, a: Snapshot, b: Snapshot, row_title: str, column_title: str, n: int) -> SimilarityMap:
    a, b = (dataclasses.replace(snapshot, layers=dict(snapshot.layers)) for snapshot in (a, b))
    values = matrix(measure, list(a.layers.values()), list(b.layers.values()))
    title = f"epoch {a.epoch} and epoch {b.epoch}"
    layers = tuple(a.layers), tuple(b.layers)
    distance, own, note = is_distance(measure), is_own_scale(measure), cautions(measure, a, b)
    table = SimilarityMap(tag(measure), title, *layers, values, row_title, column_title, n, note, distance)
    table = dataclasses.replace(with_reliability(table, measure, a, b), own_scale=own)
    shared = [layer for layer in table.rows if layer in table.columns]
    if chances := by_chance([_at(table, table.chance, layer) for layer in shared]):
        return dataclasses.replace(table, note=f"By chance layers of one name score {chances}. {note}")
    return table


def _enough_kept(runs: Sequence[RunPath], snapshots: Sequence[Snapshot], measures: Sequence[AnyMeasure]) -> None:
    """Raise a ValueError where a measure asks for singular vectors, of which half precision leaves too little."""
    for measure in measures:
        if too_little := _too_little(runs, snapshots, measure):
            raise ValueError(
                f"measures: expected kinds of linear CKA, for which alone {too_little[0]} kept its layers, got"
                f" {tag(measure)}; name it in RepresentationSimilarity(measures=...) when training"
            )


def _too_little(runs: Sequence[RunPath], snapshots: Sequence[Snapshot], measure: AnyMeasure) -> list[RunPath]:
    """Return the runs that kept too little of their layers for a measure."""
    if needs([measure]) == "gram":
        return []
    pairs = zip(runs, snapshots, strict=True)
    return [run for run, snapshot in pairs if not all(layer.factorable for layer in snapshot.layers.values())]


def _open(run: RunPath) -> SnapshotStore:
    root = Folder(str(run))
    if found := _places(root, PLACES):
        return open_store(found[0])
    inside = [
        place
        for above in (root, root.folder("interp"))
        for name in sorted(above.names("*"))
        for place in _places(above.folder(name), PLACES[1:])
    ]
    if len(inside) == 1:
        return open_store(inside[0])
    hint = f"; there are {', '.join(folder.path for folder in inside)}" if inside else ", found none"
    raise FileNotFoundError(f"{run}: expected a run with snapshots (interp/similarity/manifest.json){hint}")


def _places(root: Folder, places: Sequence[str]) -> list[Folder]:
    folders = [root.folder(place) if place else root for place in places]
    return [folder for folder in folders if folder.exists("manifest.json")]


def _same_probe(runs: Sequence[RunPath], stores: Sequence[SnapshotStore]) -> None:
    first = stores[0].manifest["probe"]
    for run, store in zip(runs, stores, strict=True):
        probe = store.manifest["probe"]
        if probe["fingerprint"] != first["fingerprint"]:
            raise ValueError(
                f"runs: expected snapshots of the same samples; {runs[0]} shows {_told(first)}, {run} {_told(probe)},"
                f" {_difference(first, probe)}; train with the same probe= dataset to compare"
            )
        for choice in ("maps", "tokens"):
            if probe.get(choice) != first.get(choice):
                raise ValueError(
                    f"runs: expected the same {choice}= in RepresentationSimilarity; {runs[0]} has"
                    f" {first.get(choice)!r}, {run} {probe.get(choice)!r}"
                )


def _told(probe: dict[str, object]) -> str:
    return f"{probe['n']} of the {probe['source']}"


def _difference(first: dict[str, Any], other: dict[str, Any]) -> str:
    """Say in words how two probes of other values differ."""
    ids, others = list(first["ids"]), list(other["ids"])
    if len(ids) != len(others):
        return "another number of samples"
    if ids == others:
        return "the same ids with other values"
    if sorted(ids) == sorted(others):
        return "the same ids in another order"
    return f"other ids, {len(set(ids) & set(others))} of them shared"


def _snapshot(store: SnapshotStore, epoch: int | None) -> Snapshot:
    entries = store.manifest["snapshots"]
    found = [e["step"] for e in entries if epoch is None or e["epoch"] == epoch]
    if not found:
        there = sorted({e["epoch"] for e in entries})
        raise ValueError(f"epochs: expected one of {there} for {store.folder.path}, got {epoch}")
    return store.read(found[-1 if epoch is None else 0])  # the first after so many epochs is nearest to their end


def _names(runs: Sequence[RunPath]) -> tuple[str, ...]:
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
        rows.append(["mean", *(_mean([values[i] for values in same.values()]) for i in range(len(tables)))])
        rows.append(["by chance", *(_chances(table, list(same)) for table in tables)])
    return [heading, *rows]


def _cell(table: SimilarityMap, layer: str, value: float) -> str:
    error = _at(table, table.standard_error, layer)
    return (f"{value:.3f}" if value == value else "–") + (f" ± {error:.3f}" if error == error else "")


def correspondence_in_words(comparison: Comparison, measure: str) -> str:
    """Return in words how often the most similar layer is that of the same name, and over how many layers."""
    share, same = comparison.correspondence(measure), comparison.same_layers(measure)
    defined = sum(any(value == value for value in values) for values in same.values())
    over = f"{defined} of {len(same)} layers with a value"
    return f"most similar layer has the same name: {share:.0%}, over {over}" if share == share else f"{over} to match"


def _mean(values: Sequence[float]) -> str:
    known = [value for value in values if value == value]
    if not known:
        return "not defined"
    of = "" if len(known) == len(values) else f" ({len(known)} of {len(values)} layers)"
    return f"{sum(known) / len(known):.3f}{of}"


def _chances(table: SimilarityMap, layers: Sequence[str]) -> str:
    return by_chance([_at(table, table.chance, layer) for layer in layers], 3) or "unknown"


def _at(table: SimilarityMap, values: Tensor | None, layer: str) -> float:
    place = table.rows.index(layer), table.columns.index(layer)
    return float("nan") if values is None else float(values[place])
