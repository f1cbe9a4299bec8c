"""A network and its data, brought back from a checkpoint."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from lightning_interp.network.checkpoint_file import checkpoint_content

BATCH_SIZE = 64  # for a dataset without a loader: gradients are taken in chunks that fit in memory anyway
PACKAGES = ("lightning.", "pytorch_lightning.")
CheckpointContent = dict[str, Any]


def read_checkpoint(path: str | os.PathLike[str], trusted: bool = False) -> CheckpointContent:
    """Return what a Lightning checkpoint holds, on the CPU.

    Args:
        path: local, or an fsspec address.
        trusted: whether to unpickle arbitrary objects, which may run code; else only tensors and plain Python objects.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no Lightning checkpoint, or holds more than may be unpickled.
    """
    content = checkpoint_content(path, trusted, "where you trust the file, say so (trusted=True, --trust)")
    if "state_dict" not in content:
        raise ValueError(f"checkpoint: expected a Lightning checkpoint, with a state_dict in it, in {os.fspath(path)}")
    return dict(content)


def restored_module(
    source: Any, path: str | os.PathLike[str], content: CheckpointContent, trusted: bool = False
) -> Any:
    """Return the network with the checkpoint's weights.

    Args:
        source: a LightningModule's class, made with the checkpoint's hyperparameters; an instance, or a function that
            returns one.
        path: the checkpoint.
        content: what it holds.
        trusted: as for `read_checkpoint`.

    Raises:
        TypeError: `source` is something else.
        ValueError: the class needs more than the checkpoint holds, or the weights do not fit.
    """
    if isinstance(source, type):
        _expect("LightningModule", "module", source, source)
        return _from_checkpoint(source, path, "module", trusted)
    module = source() if callable(source) and not _is_a(type(source), "LightningModule") else source
    _expect("LightningModule", "module", source, module)
    with _mismatch_in_one_line(type(module).__name__):
        module.configure_model()
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"], strict=module.strict_loading)
    return module


def restored_data(
    source: Any, module: Any, path: str | os.PathLike[str], content: CheckpointContent, trusted: bool = False
) -> CheckpointContent:
    """Return the data as keywords for `Trainer.fit`.

    Args:
        source: a LightningDataModule's class, made with the checkpoint's hyperparameters if it holds any; an instance;
            a pair (training, validation) of loaders or datasets; a function that returns one of these; None where the
            network has loaders of its own.
        module: the network.
        path: the checkpoint.
        content: what it holds.
        trusted: as for `read_checkpoint`.

    Raises:
        TypeError: `source` is something else.
        ValueError: the class needs more than the checkpoint holds.
    """
    if source is None:
        if type(module).train_dataloader.__module__.startswith(PACKAGES):
            raise ValueError(
                f"data: expected the training data, got none, nor has {type(module).__name__} a train_dataloader"
            )
        return {}
    if isinstance(source, type):
        _expect("LightningDataModule", "data", source, source)
        saved = source.CHECKPOINT_HYPER_PARAMS_KEY in content  # type: ignore[attr-defined]
        return {
            "datamodule": _from_checkpoint(source, path, "data", trusted)
            if saved
            else _without_arguments(source, "data")
        }
    data = source() if callable(source) and not _is_a(type(source), "LightningDataModule") else source
    if _is_a(type(data), "LightningDataModule"):
        return {"datamodule": data}
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(
            "data: expected a LightningDataModule, a pair (training, validation) of loaders or datasets, or a function"
            f" that returns either, got a {type(data).__name__}"
        )
    return {"train_dataloaders": _loader(data[0]), "val_dataloaders": _loader(data[1])}


def named_class(content: Mapping[str, Any]) -> str:
    """Return the class of its network that a checkpoint names, as LightningCLI's do; empty where it names none."""
    path, _, name = str((content.get("hyper_parameters") or {}).get("_class_path", "")).rpartition(".")
    return f"{path}:{name}" if path else ""


def weights_only(function: Callable[..., Any], trusted: bool) -> CheckpointContent:
    """Return the keyword that keeps a function of Lightning's from unpickling code; older versions have none."""
    return {"weights_only": not trusted} if "weights_only" in inspect.signature(function).parameters else {}


def _from_checkpoint(kind: Any, path: str | os.PathLike[str], argument: str, trusted: bool) -> Any:
    load = kind.load_from_checkpoint
    with _mismatch_in_one_line(kind.__name__):
        try:
            return load(os.fspath(path), map_location="cpu", **weights_only(load, trusted))
        except TypeError as error:
            raise _missing_hyperparameters(kind, argument, error) from error


def _without_arguments(kind: Any, argument: str) -> Any:
    try:
        return kind()
    except TypeError as error:
        raise _missing_hyperparameters(kind, argument, error) from error


def _missing_hyperparameters(kind: Any, argument: str, error: TypeError) -> ValueError:
    return ValueError(
        f"{argument}: {kind.__name__} cannot be made with what the checkpoint holds ({error}); let it call"
        " save_hyperparameters() before it is trained, or pass an instance or a function without arguments"
    )


@contextmanager
def _mismatch_in_one_line(class_name: str) -> Iterator[None]:
    """Turn torch's many lines about weights that do not fit into one line."""
    try:
        yield
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        first, *further_lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        remainder = f" (and {len(further_lines)} more)" if further_lines else ""
        raise ValueError(f"module: the checkpoint's weights do not fit {class_name}: {first}{remainder}") from error


def _loader(source: Any) -> Any:
    indexed = hasattr(source, "__getitem__") and not isinstance(source, (DataLoader, list, tuple, dict))
    return DataLoader(source, BATCH_SIZE) if indexed else source


def _is_a(kind: type, name: str) -> bool:
    """Say whether a class is of Lightning's kind, in either of its two packages."""
    return any(base.__name__ == name and base.__module__.startswith(PACKAGES) for base in kind.__mro__)


def _expect(expected: str, argument: str, source: Any, result: Any) -> None:
    """Raise an error unless a source, or what it returned, is of a class of Lightning's, or is one."""
    kind = result if isinstance(result, type) else type(result)
    if not _is_a(kind, expected):
        got = f"the class {kind.__name__}" if kind is result else f"a {kind.__name__}"
        origin = f" from {getattr(source, '__name__', source)}" if source is not result else ""
        raise TypeError(f"{argument}: expected a {expected}, got {got}{origin}")
