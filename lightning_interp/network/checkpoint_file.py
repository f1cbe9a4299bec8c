"""A checkpoint file read: weights by safetensors or `torch.save`, or all that a Lightning checkpoint holds."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import fsspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load

LOAD_IT_YOURSELF = "where you trust the file, load it yourself and pass its state dict"


def checkpoint_content(
    path: str | os.PathLike[str], trusted: bool = False, remedy: str = LOAD_IT_YOURSELF
) -> Mapping[str, Any]:
    """Return what a checkpoint file holds, on the CPU.

    Args:
        path: local, or an fsspec address (`s3://…`); a name that ends in `.safetensors` is of such a file.
        trusted: whether to unpickle arbitrary objects, which may run code; else only tensors and plain Python objects.
        remedy: what the error recommends where the file holds more than may be unpickled.

    Returns:
        Tensor names → tensors, or the entries of a Lightning checkpoint, whose weights are under `state_dict`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another format, or holds more than may be unpickled.
    """
    address = os.fspath(path)
    try:
        with fsspec.open(address, "rb") as file:
            if address.endswith(".safetensors"):
                return load(file.read())
            content = torch.load(file, map_location="cpu", weights_only=not trusted)
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"checkpoint: expected a file, found none at {address}") from None
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {address} is no file that safetensors can read ({error})") from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        # torch names the type that it refuses only in its message: "... Unsupported global: GLOBAL a.b.C was not ...".
        refused_type = str(error).partition("GLOBAL ")[2].split(" was not")[0]
        if not refused_type:
            raise ValueError(f"checkpoint: {address} is no file that torch.load can read") from error
        raise ValueError(
            f"checkpoint: expected tensors and plain Python in {address}, got {refused_type} too, and unpickling could"
            f" run code; {remedy}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint: expected a state dict in {address}, got {type(content).__name__}")
    return content


def is_file(path: str | os.PathLike[str]) -> bool:
    """Say whether a path or an fsspec address leads to a file."""
    system, local_path = fsspec.core.url_to_fs(os.fspath(path))
    return bool(system.isfile(local_path))
