"""The command line: `lightning-interp compare RUN RUN [...]`."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_interp import figures
from lightning_interp.board import clean
from lightning_interp.compare import Comparison, compare, table_of
from lightning_interp.similarity import CCA, CKA, PWCCA, SVCCA, Measure, Procrustes, RBFKernel
from lightning_interp.storage import Folder

MEASURES: dict[str, Measure] = {
    "cka": CKA(),
    "cka-debiased": CKA(debiased=True),
    "cka-rbf": CKA(RBFKernel()),
    "cca": CCA(),
    "pwcca": PWCCA(),
    "r2-cca": CCA("mean_squared"),
    "svcca": SVCCA(),
    "procrustes": Procrustes(),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; errors of the user's are one line on standard error."""
    options = _parser().parse_args(arguments)
    try:
        chosen = [MEASURES[name] for name in options.measure or ("cka-debiased", "cka", "svcca")]
        found = compare(*options.runs, measures=chosen, epochs=options.epoch)
    except (ValueError, FileNotFoundError) as error:
        print(f"lightning-interp: {error}", file=sys.stderr)
        return 2
    for measure in found.maps:
        _print(measure, found)
    if options.out:
        _write(found, Folder(options.out))
        print(f"\nHeat maps, tables and TensorBoard events are in {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-interp", description="Compare what networks learned.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("compare", help="layer by layer, two or more runs recorded on the same samples")
    command.add_argument("runs", nargs="+", metavar="RUN", help="a run's log folder, e.g. lightning_logs/version_0")
    command.add_argument("--measure", action="append", choices=list(MEASURES), help="may be given several times")
    command.add_argument("--epoch", type=int, help="the epoch to compare; the last one when left out")
    command.add_argument("--out", metavar="DIR", help="write PNG, CSV and TensorBoard events there")
    return parser


def _print(measure: str, found: Comparison) -> None:
    rows = table_of(found, measure)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"\n{measure} of each layer with the layer of the same name (n = {found.maps[measure][0].n} samples)")
    for row in rows:
        print("  " + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for note in dict.fromkeys(table.note for table in found.maps[measure] if table.note):
        print(f"  {note}")
    share = found.correspondence(measure)
    print(
        f"  most similar layer has the same name: {share:.0%}" if share == share else "  no layer with a value to match"
    )


def _write(found: Comparison, folder: Folder) -> None:
    with SummaryWriter(folder.path) as board:
        for measure, tables in found.maps.items():
            for table in tables:
                name = clean(f"{measure}-{table.row_title}-{table.column_title}").replace("/", "_")
                pixels = figures.heat_map(table)
                folder.write(f"{name}.png", figures.png(pixels))
                board.add_image(f"compare/{name}", pixels, 0, dataformats="HWC")
    folder.write("compare.csv", _csv(found))


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
