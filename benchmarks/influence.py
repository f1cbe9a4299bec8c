"""What influence is worth and what it costs, beside other packages: `python -m benchmarks.influence`.

Networks whose retrainings are on file. `--case sgd`: a linear 64→64, ReLU, linear 64→10 on 1,437 digits; the linear
datamodeling score (LDS) over 100 queries, against 100 retrainings on half of the samples, each a mean over 20 seeds.
`adam`, `adam20`: the same trained with Adam, against 50 retrainings, each a mean over 3 or 20 seeds. `logistic`: a
logistic regression on the same digits; r against 1,437 retrainings without one sample each.

Cost is CPU time in units of one epoch, a forward and backward of every training sample in batches of 64 sliced from
memory, timed just before and after each run; one process, one thread, rounds interleaved, medians with quartiles.
Methods above `--once` epochs are timed once. Passes are rows forward and backward through the network per training
sample, those of the queries included. Memory (`--memory`) is the peak of a process of its own above what it holds
with the package, the network and the data loaded and one epoch run, for n random samples and 10 queries; ours keeps
10 samples of each kind for a query. Where a tenth of the samples took longer than `--longest` seconds, it is left out.

Peers come from `pip install --no-deps -r benchmarks/requirements.txt`; one that is missing is said to be.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.influence_cost import Passes, epoch, epoch_of_loader, in_epochs
from benchmarks.influence_data import Case, adam_mlp, ceiling, logistic_regression, sgd_mlp, synthetic
from benchmarks.influence_figure import draw, frontier
from benchmarks.influence_methods import CORRECTED, OURS, STREAMED, Method
from benchmarks.influence_peers import MODULES, PEERS
from benchmarks.stubs import load
from benchmarks.timing import Work, cpu_seconds, peak_mb, spread

Row = dict[str, Any]
NS = (1_000, 10_000, 100_000)
CASES: dict[str, Callable[[], Case]] = {
    "sgd": sgd_mlp,
    "adam": adam_mlp,
    "adam20": partial(adam_mlp, "loss_of_20_seeds"),
    "logistic": logistic_regression,
}


def named(ours: Mapping[str, Method]) -> dict[str, Method]:
    return {f"ours: {name}": method for name, method in ours.items()}


def chosen(every: Mapping[str, Method], only: Sequence[str]) -> dict[str, Method]:
    """Return the methods whose name holds one of the words; all when there are none."""
    return {name: method for name, method in every.items() if not only or any(word in name for word in only)}


def fits(name: str, case: Case) -> bool:
    """Say whether the case has the networks or checkpoints that a method is named for."""
    return (len(case.models) > 1 or "6 models" not in name) and (len(case.rates) > 1 or "8 checkpoints" not in name)


def first(name: str, method: Method, case: Case) -> Row | None:
    """Run a method once: its quality, its passes and its cost when cold; None if it cannot run here.

    Raises:
        RuntimeError: it changed the network, on which the others are to run.
    """
    passes, found = Passes(), []
    before = [p.detach().clone() for p in case.net.parameters()]

    def work() -> None:
        with passes.counted({case.net, *case.models}):
            found.append(method(case))

    try:
        with quiet():
            cost = in_epochs(work, case)
            quality = case.quality(found[0])
    except Exception as error:  # a peer that is missing or cannot is said to be, and the others go on
        print(f"{name}: left out ({type(error).__name__}: {error})"[:300], flush=True)
        return None
    if any(not torch.equal(one, other) for one, other in zip(before, case.net.parameters(), strict=True)):
        raise RuntimeError(f"{name}: expected the network's weights as they were, got others")
    n = len(case.train)
    whose, _, short = name.partition(" ")
    return {
        "name": short,
        "whose": whose.rstrip(":"),
        "quality": quality,
        "forward": passes.forward / n,
        "backward": passes.backward / n,
        "costs": [cost],
    }


def compared(methods: Mapping[str, Method], case: Case, rounds: int, once: float) -> list[Row]:
    """Return a row for each method, timed in interleaved rounds after a first run."""
    rows = {name: row for name, method in methods.items() if (row := first(name, method, case))}
    again: dict[str, list[float]] = {name: [] for name, row in rows.items() if row["costs"][0] <= once}
    for _ in range(rounds):
        for name, costs in again.items():
            with quiet():
                costs.append(in_epochs(partial(methods[name], case), case))
    for name, row in rows.items():
        row["costs"] = again.get(name) or row["costs"]
        row["epochs"] = statistics.median(row["costs"])
    return list(rows.values())


def beaten_by(row: Row, rows: Sequence[Row]) -> str:
    """Return the best setting of ours that is both cheaper and better than a peer's row."""
    if row["whose"] == "ours":
        return ""
    better = [one for one in rows if one["epochs"] < row["epochs"] and one["quality"] > row["quality"]]
    ours = [one for one in better if one["whose"] == "ours"]
    return max(ours, key=lambda one: one["quality"])["name"] if ours else "nothing"


def table(rows: Sequence[Row], what: str) -> None:
    print(f"\n| whose | method | {what} | epochs, median (quartiles) | forward / backward | ours, cheaper and better |")
    print("|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: row["epochs"]):
        passes = f"{row['forward']:.1f} / {row['backward']:.1f}"
        print(
            f"| {row['whose']} | {row['name']} | {row['quality']:.4f} | {spread(row['costs'])} | {passes} |"
            f" {beaten_by(row, rows)} |"
        )


def of_memory(name: str, net: str, n: int) -> tuple[Work, Work]:
    """Return an epoch, which warms up, and a method on `n` random samples."""
    load(MODULES.get(name.partition(" ")[0], "torch"))
    case = synthetic(net, n)
    return partial(epoch, case), quiet()(partial((PEERS | named(STREAMED))[name], case))


def memory(names: Sequence[str], longest: float) -> list[Row]:
    """Return and print each method's peak memory for each network and number of samples."""
    rows: list[Row] = []
    for name in names:
        for net in ("mlp", "cnn"):
            row: Row = {"name": name, "net": net}
            for n in NS:
                start = time.perf_counter()
                try:
                    row[str(n)] = peak_mb(of_memory, name, net, n)
                except Exception as error:
                    print(f"{name}, {net}, {n}: left out ({type(error).__name__}: {error})"[:300], flush=True)
                    break
                if time.perf_counter() - start > longest:
                    break
            rows.append(row)
            cells = " | ".join(f"{row[str(n)]:.0f}" if str(n) in row else "–" for n in NS)
            print(f"| {name} | {net} | {cells} |", flush=True)
    return rows


@contextlib.contextmanager
def quiet() -> Any:
    """Keep the peers' progress bars and prints off the table."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="words, one of which a method's name holds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--once", type=float, default=1000, help="epochs above which a method is timed once")
    parser.add_argument("--case", choices=CASES, default="sgd")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of quality and time")
    parser.add_argument("--longest", type=float, default=45)
    parser.add_argument("--json", type=Path, help="where the rows go; those of other methods that it holds stay")
    parser.add_argument("--figure", type=Path, help="where the frontier of all rows in --json is drawn")
    return parser.parse_args()


def merged(path: Path | None, key: str, rows: list[Row], same: Sequence[str]) -> list[Row]:
    """Put the rows into a JSON file in place of earlier ones of the same methods; return all it holds."""
    if path is None:
        return rows
    held = json.loads(path.read_text()) if path.exists() else {}
    new = {tuple(row[part] for part in same) for row in rows}
    rows = [row for row in held.get(key, []) if tuple(row[part] for part in same) not in new] + rows
    path.write_text(json.dumps(held | {key: rows}, indent=1))
    return rows


def main() -> None:
    given = options()
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if given.memory:
        names = list(chosen(named(STREAMED) | PEERS, given.only))
        print(f"| method | network | {' | '.join(f'MB, n = {n:,}' for n in NS)} |\n|---|---|{'---|' * len(NS)}")
        merged(given.json, "memory", memory(names, given.longest), ("name", "net"))
        return
    case = CASES[given.case]()
    ours = {**OURS, **CORRECTED} if given.case == "logistic" else OURS
    epoch(case)
    bare = [cpu_seconds(partial(epoch, case)) * 1e3 for _ in range(20)]
    loaded = [cpu_seconds(partial(epoch_of_loader, case)) * 1e3 for _ in range(5)]
    print(f"One epoch: {spread(bare)} ms; through a DataLoader: {spread(loaded)} ms.")
    methods = {name: method for name, method in chosen(named(ours) | PEERS, given.only).items() if fits(name, case)}
    rows = compared(methods, case, given.repeats, given.once)
    rows = merged(given.json, given.case, rows, ("whose", "name"))
    table(rows, "r" if given.case == "logistic" else "LDS")
    if given.case == "sgd":
        print(f"\nHalf of the retrainings' seeds against the other half: {ceiling():.3f}.")
    if given.figure:
        draw(rows, str(given.figure))
        print("Our frontier:", "; ".join(row["name"] for row in frontier([r for r in rows if r["whose"] == "ours"])))


if __name__ == "__main__":
    main()
