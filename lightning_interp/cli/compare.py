"""The command `lightning-interp compare RUN RUN [...]`: the layers of two or more runs, from their snapshots."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_interp.checks import clean
from lightning_interp.compare import Comparison, compare, correspondence_in_words, table_of
from lightning_interp.similarity import CCA, CKA, PWCCA, SVCCA, Measure, MutualKNN, Procrustes, RBFKernel
from lightning_interp.storage.folder import Folder
from lightning_interp.views.canvas import png
from lightning_interp.views.heat_map import heat_map
from lightning_interp.views.tables import as_csv, as_markdown

MEASURES: dict[str, Measure] = {
    "cka": CKA(),
    "cka-debiased": CKA(debiased=True),
    "cka-rbf": CKA(RBFKernel()),
    "cka-rbf-debiased": CKA(RBFKernel(), debiased=True),
    "cca": CCA(),
    "cca-largest": CCA("largest"),
    "pwcca": PWCCA(),
    "r2-cca": CCA("mean_squared"),
    "svcca": SVCCA(),
    "r2-svcca": SVCCA(summary="mean_squared"),
    "procrustes": Procrustes(),
    "procrustes-angle": Procrustes(angle=True),
    "mutual-knn": MutualKNN(),
}
COLUMNS_OF_COMPARISON = (
    "measure",
    "run_a",
    "layer_a",
    "run_b",
    "layer_b",
    "similarity",
    "by_chance",
    "standard_error",
)


def add_compare_command(commands: Any) -> None:
    """Add the command and its options to the subparsers of a command line."""
    command = commands.add_parser("compare", help="layer by layer, two or more runs recorded on the same samples")
    command.add_argument("runs", nargs="+", metavar="RUN", help="a run's log folder, e.g. lightning_logs/version_0")
    command.add_argument("--measure", action="append", choices=list(MEASURES), help="may be given several times")
    command.add_argument("--epoch", type=int, help="the epoch to compare; the last one when left out")
    command.add_argument("--out", metavar="DIR", help="write PNG, CSV and TensorBoard events there")
    command.set_defaults(run=run_compare)


def run_compare(options: argparse.Namespace) -> None:
    """Compare the runs, print a table for each measure, and write files if a folder is given.

    Raises:
        FileNotFoundError, ValueError: a run or an option cannot be used; the message names it.
    """
    measures = [MEASURES[name] for name in options.measure] if options.measure else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the only warning says what is left out, which is printed below
        comparison = compare(*options.runs, measures=measures, epochs=options.epoch)
    for measure in comparison.maps:
        _print_table(measure, comparison)
    for name in comparison.left_out:
        print(f"\n{name} is left out: a run kept too little for it (name it in measures= when training)")
    if options.out:
        _write_files(comparison, Folder(options.out))
        print(f"\nHeat maps, tables and TensorBoard events are in {options.out}")


def _print_table(measure: str, comparison: Comparison) -> None:
    rows = table_of(comparison, measure)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first_map = comparison.maps[measure][0]
    scale = "; 0 means the same" if first_map.distance else ""
    print(f"\n{measure} of each layer with the layer of the same name (n = {first_map.n} samples{scale})")
    for row in rows:
        print("  " + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for note in _notes_on(measure, comparison):
        print(f"  {note}")


def _notes_on(measure: str, comparison: Comparison) -> list[str]:
    notes = dict.fromkeys(similarity.note for similarity in comparison.maps[measure] if similarity.note)
    return [*notes, correspondence_in_words(comparison, measure)]


def _markdown_section(measure: str, comparison: Comparison) -> str:
    """Return a measure's table of layers and the notes on it."""
    table = as_markdown(table_of(comparison, measure))
    return "\n\n".join([f"## {measure}", table, *_notes_on(measure, comparison)])


def _write_files(comparison: Comparison, folder: Folder) -> None:
    with SummaryWriter(folder.path) as board:
        for measure, similarity_maps in comparison.maps.items():
            for similarity in similarity_maps:
                name = clean(f"{measure}-{similarity.row_title}-{similarity.column_title}").replace("/", "_")
                pixels = heat_map(similarity)
                folder.write(f"{name}.png", png(pixels))
                board.add_image(f"compare/{name}", pixels, 0, dataformats="HWC")
            board.add_text(f"compare/{clean(measure)}", _markdown_section(measure, comparison), 0)
    folder.write("compare.csv", as_csv(COLUMNS_OF_COMPARISON, _comparison_rows(comparison)))
    sections = [_markdown_section(measure, comparison) for measure in comparison.maps]
    folder.write("compare.md", "\n\n".join(sections) + "\n")


def _comparison_rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    """Yield every pair of layers: the similarity, its value by chance and its standard error."""
    for measure, similarity_maps in comparison.maps.items():
        for similarity in similarity_maps:
            tables = (similarity.values, similarity.chance, similarity.standard_error)
            for i, row_layer in enumerate(similarity.rows):
                for j, column_layer in enumerate(similarity.columns):
                    names = (measure, similarity.row_title, row_layer, similarity.column_title, column_layer)
                    yield (*names, *(_six_decimals(table, i, j) for table in tables))


def _six_decimals(table: Tensor | None, i: int, j: int) -> str:
    return "" if table is None or table[i, j].isnan() else f"{float(table[i, j]):.6f}"
