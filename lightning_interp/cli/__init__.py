"""The command line: `lightning-interp compare RUN RUN [...]` and `lightning-interp influence CHECKPOINT`."""

from __future__ import annotations

import argparse
import csv
import io
import sys
import warnings
from collections.abc import Sequence

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_interp.checks import clean
from lightning_interp.cli import influence
from lightning_interp.compare import Comparison, compare, table_of, told_correspondence
from lightning_interp.similarity import CCA, CKA, PWCCA, SVCCA, Measure, Procrustes, RBFKernel
from lightning_interp.storage.folder import Folder
from lightning_interp.views.canvas import png
from lightning_interp.views.heat_map import heat_map

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
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; errors of the user's are one line on standard error."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, FileNotFoundError, FloatingPointError) as error:
        print(f"lightning-interp: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _compare(options: argparse.Namespace) -> None:
    chosen = [MEASURES[name] for name in options.measure] if options.measure else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left out is printed
        found = compare(*options.runs, measures=chosen, epochs=options.epoch)
    for measure in found.maps:
        _print(measure, found)
    for name in found.left_out:
        print(f"\n{name} is left out: a run kept too little for it (name it in measures= when training)")
    if options.out:
        _write(found, Folder(options.out))
        print(f"\nHeat maps, tables and TensorBoard events are in {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-interp", description="What networks learned, after training.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("compare", help="layer by layer, two or more runs recorded on the same samples")
    command.add_argument("runs", nargs="+", metavar="RUN", help="a run's log folder, e.g. lightning_logs/version_0")
    command.add_argument("--measure", action="append", choices=list(MEASURES), help="may be given several times")
    command.add_argument("--epoch", type=int, help="the epoch to compare; the last one when left out")
    command.add_argument("--out", metavar="DIR", help="write PNG, CSV and TensorBoard events there")
    command.set_defaults(run=_compare)
    influence.add_to(commands)
    return parser


def _print(measure: str, found: Comparison) -> None:
    rows = table_of(found, measure)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    first = found.maps[measure][0]
    same = "; 0 means the same" if first.distance else ""
    print(f"\n{measure} of each layer with the layer of the same name (n = {first.n} samples{same})")
    for row in rows:
        print("  " + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for note in _notes(measure, found):
        print(f"  {note}")


def _notes(measure: str, found: Comparison) -> list[str]:
    notes = dict.fromkeys(table.note for table in found.maps[measure] if table.note)
    return [*notes, told_correspondence(found, measure)]


def _markdown(measure: str, found: Comparison) -> str:
    """Return a measure's table of layers and what is said of it."""
    heading, *rows = ["| " + " | ".join(row) + " |" for row in table_of(found, measure)]
    table = "\n".join([heading, "|---" * (len(found.pairs) + 1) + "|", *rows])
    return "\n\n".join([f"## {measure}", table, *_notes(measure, found)])


def _write(found: Comparison, folder: Folder) -> None:
    with SummaryWriter(folder.path) as board:
        for measure, tables in found.maps.items():
            for table in tables:
                name = clean(f"{measure}-{table.row_title}-{table.column_title}").replace("/", "_")
                pixels = heat_map(table)
                folder.write(f"{name}.png", png(pixels))
                board.add_image(f"compare/{name}", pixels, 0, dataformats="HWC")
            board.add_text(f"compare/{clean(measure)}", _markdown(measure, found), 0)
    folder.write("compare.csv", _csv(found))
    folder.write("compare.md", "\n\n".join(_markdown(measure, found) for measure in found.maps) + "\n")


def _csv(found: Comparison) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    columns = ("measure", "run_a", "layer_a", "run_b", "layer_b", "similarity", "by_chance", "standard_error")
    writer.writerow(columns)
    for measure, tables in found.maps.items():
        for table in tables:
            for i, a in enumerate(table.rows):
                for j, b in enumerate(table.columns):
                    numbers = (_number(held, i, j) for held in (table.values, table.chance, table.standard_error))
                    writer.writerow((measure, table.row_title, a, table.column_title, b, *numbers))
    return buffer.getvalue()


def _number(values: Tensor | None, i: int, j: int) -> str:
    return "" if values is None or values[i, j].isnan() else f"{float(values[i, j]):.6f}"


if __name__ == "__main__":
    sys.exit(main())
