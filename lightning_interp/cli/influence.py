"""The command `lightning-interp influence CHECKPOINT`: influence scores after training, from a checkpoint."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

from lightning_interp import DataInfluence

# Under the names of both packages that Lightning is installed as.
LIGHTNING_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


def add_influence_command(commands: Any) -> None:
    """Add the command and its options to the subparsers of a command line."""
    command = commands.add_parser(
        "influence",
        help="which training samples made a trained network answer so, from its checkpoint",
        description="Do what DataInfluence does at the end of training, later: without a limit to its time.",
        epilog="Modules are looked for in the current directory too, and imported: let a script train only under"
        ' `if __name__ == "__main__":`.',
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a Lightning checkpoint")
    command.add_argument(
        "--module",
        metavar="PACKAGE.MODULE:NAME",
        help="the LightningModule's class, made with the hyperparameters in the checkpoint; or an instance, or a"
        " function that returns one",
    )
    command.add_argument(
        "--data",
        metavar="PACKAGE.MODULE:NAME",
        help="a LightningDataModule's class or an instance, a pair (training, validation) of loaders or datasets, or a"
        " function that returns one of these; not needed where the network has loaders of its own",
    )
    queries = command.add_mutually_exclusive_group()
    queries.add_argument("--queries", type=int, default=6, metavar="N", help="how many predictions to explain (6)")
    queries.add_argument("--query", type=_indices, metavar="I,J", help="which: indices of validation samples")
    command.add_argument("--top", type=int, default=5, metavar="N", help="training samples to show of each kind (5)")
    command.add_argument("--no-self-influence", action="store_true", help="leave out the samples to look at first")
    command.add_argument("--check", action="store_true", help="check the strongest by retraining the last layer alone")
    command.add_argument(
        "--budget", type=float, metavar="SECONDS", help="about how long it may take; no limit by default"
    )
    command.add_argument("--out", metavar="DIR", help="write there, as if it were the run's folder")
    command.add_argument("--device", default="auto", help='"auto" (the default), "cpu", "cuda", "cuda:1", "mps", ...')
    command.add_argument(
        "--precision", default="32-true", help='as for a Trainer: "32-true" (the default), "bf16-mixed"'
    )
    command.add_argument("--trust", action="store_true", help="unpickle all the checkpoint holds, which may run code")
    command.set_defaults(run=run_influence)


def run_influence(options: argparse.Namespace) -> None:
    """Score the training samples for the queries, write the report and print where it is.

    Raises:
        FileNotFoundError, ValueError, TypeError: an option cannot be used; the message names it.
    """
    callback = DataInfluence(
        queries=options.queries,
        top=options.top,
        self_influence=not options.no_self_influence,
        retrain="last_layer" if options.check else None,
        budget_seconds=options.budget,
    )
    module, data = (import_object(getattr(options, name), name) for name in ("module", "data"))
    with _muted_lightning() as caught:
        report = callback.explain(
            options.checkpoint,
            module,
            data,
            query=options.query,
            out=options.out,
            device=options.device,
            precision=options.precision,
            trusted=options.trust,
        )
    for warning in caught:
        owner, _, note = str(warning.message).partition(": ")
        if owner == "DataInfluence":
            print(f"note: {note}")
    print(f"The report is {report}, the tables lie beside it")


@contextmanager
def _muted_lightning() -> Iterator[list[warnings.WarningMessage]]:
    """Silence Lightning's messages on its own setup, and collect the warnings."""
    loggers = [logging.getLogger(name) for name in LIGHTNING_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")  # else one that was warned of before in this process would be missing
            yield caught
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def import_object(reference: str | None, option: str) -> Any:
    """Return what `package.module:name` refers to, searched for in the current directory too; None for None.

    Args:
        reference: as typed.
        option: name of the option, for messages.

    Raises:
        ValueError: the reference is of another form, or there is no such object.
    """
    if reference is None:
        return None
    module_name, _, attribute_path = reference.partition(":")
    if not module_name or not attribute_path:
        raise ValueError(f"--{option}: expected package.module:Name, got {reference!r}")
    if os.getcwd() not in sys.path:  # an installed command has its own folder at the front, not the user's
        sys.path.insert(0, os.getcwd())
    try:
        return reduce(getattr, attribute_path.split("."), importlib.import_module(module_name))
    except AttributeError:
        raise ValueError(f"--{option}: {module_name} has no {attribute_path}") from None
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise ValueError(f"--{option}: cannot import {module_name} ({type(error).__name__}: {error})") from error


def _indices(text: str) -> list[int]:
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between, got {text!r}") from None
