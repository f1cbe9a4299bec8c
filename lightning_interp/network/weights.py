"""A checkpoint's weights in the same network, for the duration of a context."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Checkpoint = Mapping[str, Tensor] | str | os.PathLike[str]


@contextlib.contextmanager
def loaded(model: nn.Module, checkpoint: Checkpoint) -> Iterator[None]:
    """Give a network a checkpoint's weights and buffers; its own are restored bit by bit on every way out.

    Args:
        model: its parameters stay the same objects.
        checkpoint: a state dict, or the path of a Lightning checkpoint, of a state dict by `torch.save`, or of a
            safetensors file. Nothing but tensors and plain Python is unpickled.

    Raises:
        ValueError: the file holds other things, or its weights do not fit the model.
    """
    originals = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    try:
        _load_into(model, checkpoint)
        yield
    finally:
        with torch.no_grad():
            for tensor, values in originals:
                tensor.copy_(values)


def check_checkpoints(owner: str, checkpoints: Sequence[Checkpoint]) -> None:
    """Raise an error unless there are checkpoints, and paths among them lead to files.

    Raises:
        ValueError: there are none.
        FileNotFoundError: a path leads to no file.
    """
    if isinstance(checkpoints, (str, os.PathLike, Mapping)) or not checkpoints:
        raise ValueError(f"{owner}: expected a list of state dicts or paths, got {_describe_checkpoint(checkpoints)}")
    for checkpoint in checkpoints:
        if not isinstance(checkpoint, Mapping) and not Path(checkpoint).is_file():
            raise FileNotFoundError(f"{owner}: expected a checkpoint file, got {_describe_checkpoint(checkpoint)}")


def _load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    try:
        model.load_state_dict(_state_dict(checkpoint))
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint: {_describe_checkpoint(checkpoint)} does not fit {type(model).__name__}: {error}"
        ) from error


def _state_dict(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    if isinstance(checkpoint, Mapping):
        return checkpoint
    if Path(checkpoint).suffix == ".safetensors":
        return load_file(checkpoint)
    try:
        content: Any = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint: expected tensors and plain Python in {checkpoint}, got more; load it yourself where you trust"
            " it, and pass its state dict"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint: expected a state dict in {checkpoint}, got {_type_name(content)}")
    return content.get("state_dict", content)


def _describe_checkpoint(checkpoint: object) -> str:
    return repr(os.fspath(checkpoint)) if isinstance(checkpoint, (str, os.PathLike)) else f"a {_type_name(checkpoint)}"


def _type_name(thing: object) -> str:
    empty = isinstance(thing, Sequence) and not thing
    return f"{type(thing).__name__} without entries" if empty else type(thing).__name__
