"""A network and its data, brought back from a checkpoint."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from lightning_interp.network.checkpoint_file import checkpoint_content

BATCH_SIZE = 64
PACKAGES = ("lightning.", "pytorch_lightning.")
Held = dict[str, Any]


def read_checkpoint(path: str | os.PathLike[str], trusted: bool = False) -> Held:
    """Return what a Lightning checkpoint holds, on the CPU.

    Args:
        path: local, or an fsspec address.
        trusted: whether to unpickle whatever it holds, which may run code; else tensors and plain Python alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no Lightning checkpoint, or holds more than may be unpickled.
    """
    content = checkpoint_content(path, trusted, "where you trust the file, say so (trusted=True, --trust)")
    if "state_dict" not in content:
        raise ValueError(f"checkpoint: expected a Lightning checkpoint, with a state_dict in it, in {os.fspath(path)}")
    return dict(content)


def restored_module(given: Any, path: str | os.PathLike[str], held: Held, trusted: bool = False) -> Any:
    """Return the network with the checkpoint's weights.

    Args:
        given: a LightningModule's class, made with the checkpoint's hyperparameters; an instance, or a function that
            returns one.
        path: the checkpoint.
        held: what it holds.
        trusted: as for `read_checkpoint`.

    Raises:
        TypeError: `given` is something else.
        ValueError: the class needs more than the checkpoint holds, or the weights do not fit.
    """
    if isinstance(given, type):
        _expect("LightningModule", "module", given, given)
        return _made(given, path, "module", trusted)
    made = given() if callable(given) and not _is_a(type(given), "LightningModule") else given
    _expect("LightningModule", "module", given, made)
    with _fitting(type(made).__name__):
        made.configure_model()
        made.on_load_checkpoint(held)
        made.load_state_dict(held["state_dict"], strict=made.strict_loading)
    return made


def restored_data(given: Any, module: Any, path: str | os.PathLike[str], held: Held, trusted: bool = False) -> Held:
    """Return the data as keywords for `Trainer.fit`.

    Args:
        given: a LightningDataModule's class, made with the checkpoint's hyperparameters if it holds any; an instance;
            a pair (training, validation) of loaders or datasets; a function that returns one of these; None where the
            network has loaders of its own.
        module: the network.
        path: the checkpoint.
        held: what it holds.
        trusted: as for `read_checkpoint`.

    Raises:
        TypeError: `given` is something else.
        ValueError: the class needs more than the checkpoint holds.
    """
    if given is None:
        if type(module).train_dataloader.__module__.startswith(PACKAGES):
            raise ValueError(
                f"data: expected the training data, got none, nor has {type(module).__name__} a train_dataloader"
            )
        return {}
    if isinstance(given, type):
        _expect("LightningDataModule", "data", given, given)
        saved = given.CHECKPOINT_HYPER_PARAMS_KEY in held  # type: ignore[attr-defined]
        return {"datamodule": _made(given, path, "data", trusted) if saved else _called(given, "data")}
    found = given() if callable(given) and not _is_a(type(given), "LightningDataModule") else given
    if _is_a(type(found), "LightningDataModule"):
        return {"datamodule": found}
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise TypeError(
            "data: expected a LightningDataModule, a pair (training, validation) of loaders or datasets, or a function"
            f" that returns either, got a {type(found).__name__}"
        )
    return {"train_dataloaders": _loader(found[0]), "val_dataloaders": _loader(found[1])}


def named_class(held: Mapping[str, Any]) -> str:
    """Return the class of its network that a checkpoint names, as LightningCLI's do; empty where it names none."""
    path, _, name = str((held.get("hyper_parameters") or {}).get("_class_path", "")).rpartition(".")
    return f"{path}:{name}" if path else ""


def weights_only(function: Callable[..., Any], trusted: bool) -> Held:
    """Return what tells one of Lightning's functions what to unpickle; older ones cannot be told, and unpickle all."""
    return {"weights_only": not trusted} if "weights_only" in inspect.signature(function).parameters else {}


def _made(kind: Any, path: str | os.PathLike[str], argument: str, trusted: bool) -> Any:
    load = kind.load_from_checkpoint
    with _fitting(kind.__name__):
        try:
            return load(os.fspath(path), map_location="cpu", **weights_only(load, trusted))
        except TypeError as error:
            raise _unsaved(kind, argument, error) from error


def _called(kind: Any, argument: str) -> Any:
    try:
        return kind()
    except TypeError as error:
        raise _unsaved(kind, argument, error) from error


def _unsaved(kind: Any, argument: str, error: TypeError) -> ValueError:
    return ValueError(
        f"{argument}: {kind.__name__} cannot be made with what the checkpoint holds ({error}); let it call"
        " save_hyperparameters() before it is trained, or pass an instance or a function without arguments"
    )


@contextmanager
def _fitting(named: str) -> Iterator[None]:
    """Turn torch's many lines on weights that do not fit into one."""
    try:
        yield
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        first, *more = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        others = f" (and {len(more)} more)" if more else ""
        raise ValueError(f"module: the checkpoint's weights do not fit {named}: {first}{others}") from error


def _loader(source: Any) -> Any:
    indexed = hasattr(source, "__getitem__") and not isinstance(source, (DataLoader, list, tuple, dict))
    return DataLoader(source, BATCH_SIZE) if indexed else source


def _is_a(kind: type, name: str) -> bool:
    """Say whether a class is of Lightning's kind, in either of its two packages."""
    return any(base.__name__ == name and base.__module__.startswith(PACKAGES) for base in kind.__mro__)


def _expect(wanted: str, argument: str, given: Any, made: Any) -> None:
    """Raise an error unless what was given, or what it returned, is of a class of Lightning's, or is one."""
    kind = made if isinstance(made, type) else type(made)
    if not _is_a(kind, wanted):
        got = f"the class {kind.__name__}" if kind is made else f"a {kind.__name__}"
        origin = f" from {getattr(given, '__name__', given)}" if given is not made else ""
        raise TypeError(f"{argument}: expected a {wanted}, got {got}{origin}")
