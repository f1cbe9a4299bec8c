"""A checkpoint's weights in the same network, for the duration of a context."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_interp.network.checkpoint_file import checkpoint_content, is_file

Checkpoint = Mapping[str, Tensor] | str | os.PathLike[str]


@contextlib.contextmanager
def loaded(model: nn.Module, checkpoint: Checkpoint) -> Iterator[None]:
    """Give a network a checkpoint's weights and buffers; its own are restored bit by bit on every way out.

    Args:
        model: its parameters stay the same objects.
        checkpoint: a state dict; or the path or fsspec address of a Lightning checkpoint, of a state dict by
            `torch.save`, or of a safetensors file. Nothing but tensors and plain Python is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds other things, or its weights do not fit the model.
    """
    originals = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    try:
        # Inside the `try`: a load that fails has copied some weights already.
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
        if not isinstance(checkpoint, Mapping) and not is_file(checkpoint):
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
    content = checkpoint_content(checkpoint)
    return content.get("state_dict", content)


def _describe_checkpoint(checkpoint: object) -> str:
    return repr(os.fspath(checkpoint)) if isinstance(checkpoint, (str, os.PathLike)) else f"a {_type_name(checkpoint)}"


def _type_name(thing: object) -> str:
    empty = isinstance(thing, Sequence) and not thing
    return f"{type(thing).__name__} without entries" if empty else type(thing).__name__
