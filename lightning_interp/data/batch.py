"""Batches as Lightning users write them: tensors in tuples, dicts, dataclasses, however nested."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


class Ragged(list[Tensor]):
    """Samples of different sizes, `(C, H, W)` each: a list that is one model input, not several."""


def is_ragged(part: Any) -> bool:
    """Say whether a list holds samples of different sizes, not several inputs: images with as many channels.

    >>> is_ragged([torch.zeros(3, 8, 8), torch.zeros(3, 9, 7)]), is_ragged([torch.zeros(4, 3), torch.zeros(4)])
    (True, False)
    """
    if isinstance(part, Ragged):
        return True
    if type(part) is not list or len(part) < 2 or not all(isinstance(p, Tensor) and p.ndim == 3 for p in part):
        return False
    return len({p.shape[0] for p in part}) == 1 and len({p.shape for p in part}) > 1


def tensors(batch: Any) -> Iterator[Tensor]:
    """Yield every tensor of a batch, in a fixed order.

    >>> [t.shape[0] for t in tensors({"x": torch.zeros(2, 3), "more": (torch.zeros(4), "text")})]
    [2, 4]
    """
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for key in batch:
            yield from tensors(batch[key])
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            yield from tensors(part)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from tensors(getattr(batch, field.name))


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """Return the same structure with `function` applied to each of its tensors.

    >>> map_tensors(lambda t: t.sum().item(), {"x": torch.ones(2), "y": [torch.ones(3), "text"]})
    {'x': 2.0, 'y': [3.0, 'text']}
    """
    if isinstance(batch, Tensor):
        return function(batch)
    return _rebuild(batch, lambda part: map_tensors(function, part))


def count_samples(batch: Any) -> int:
    """Return the number of samples: the leading dimension of the first tensor that has one.

    Raises:
        ValueError: the batch holds no tensor with a leading dimension.
    """
    if (
        type(batch) in (tuple, list)
        and not is_ragged(batch)
        and batch
        and isinstance(batch[0], Tensor)
        and batch[0].ndim
    ):
        return batch[0].shape[0]  # the usual batch, without a walk
    for rows in _leading_dimensions(_mark_ragged(batch)):
        return rows
    raise ValueError(
        f"batch: expected at least one tensor with a leading sample dimension, got {type(batch).__name__} without any"
    )


def _leading_dimensions(part: Any) -> Iterator[int]:
    """Yield the leading dimension of each tensor, and the length of each ragged list."""
    if is_ragged(part):
        yield len(part)
    elif isinstance(part, Tensor):
        if part.ndim:
            yield part.shape[0]
    elif isinstance(part, Mapping):
        for value in part.values():
            yield from _leading_dimensions(value)
    elif isinstance(part, (tuple, list)):
        for inner in part:
            yield from _leading_dimensions(inner)
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        for field in dataclasses.fields(part):
            yield from _leading_dimensions(getattr(part, field.name))


def slice_samples(batch: Any, start: int, stop: int) -> Any:
    """Return samples `start` to `stop` of a batch; what is not one row per sample stays whole.

    >>> slice_samples((torch.arange(5), "name"), 1, 3)
    (tensor([1, 2]), 'name')
    """
    marked = _mark_ragged(batch)
    return _slice_value(marked, count_samples(marked), start, stop)


def _mark_ragged(batch: Any) -> Any:
    """Return a batch `(images, ..., labels)` whose list of images is one input: it has one image for each label."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or isinstance(batch, Ragged):
        return batch
    labels = batch[-1]
    n = labels.shape[0] if isinstance(labels, Tensor) and labels.ndim else 0
    if not any(_one_image_each(part, n) for part in batch[:-1]):
        return batch
    return tuple(Ragged(part) if _one_image_each(part, n) else part for part in batch)


def _one_image_each(part: Any, n: int) -> bool:
    return type(part) is list and len(part) == n and all(isinstance(p, Tensor) and p.ndim == 3 for p in part)


def _slice_value(part: Any, n: int, start: int, stop: int) -> Any:
    if isinstance(part, Tensor):
        return part[start:stop] if part.ndim and part.shape[0] == n else part
    if is_ragged(part):
        return Ragged(part[start:stop])
    if isinstance(part, list) and len(part) == n and not any(isinstance(p, Tensor) for p in part):
        return part[start:stop]
    return _rebuild(part, lambda inner: _slice_value(inner, n, start, stop))


def select_samples(batch: Any, rows: Int[Tensor, " m"], old: Tensor | None = None, new: Tensor | None = None) -> Any:
    """Return a copy of the given samples of a batch, in that order; one tensor may be replaced by another.

    Args:
        batch: of n samples.
        rows: which of them, with repetition.
        old: a tensor of the batch.
        new: what stands in its place.

    >>> select_samples({"x": torch.arange(3), "name": ["a", "b", "c"]}, torch.tensor([2, 2]))
    {'x': tensor([2, 2]), 'name': ['c', 'c']}
    """
    batch = _mark_ragged(batch)
    n = count_samples(batch)

    def pick(part: Any) -> Any:
        if isinstance(part, Tensor):
            if part is old:
                return new
            return part.index_select(0, rows.to(part.device)) if part.ndim and part.shape[0] == n else part.clone()
        if is_ragged(part):
            stands = new is not None and old is not None and old.data_ptr() == part[0].data_ptr()
            return Ragged(new.unbind() if stands and new is not None else [part[row].clone() for row in rows.tolist()])
        if isinstance(part, list) and len(part) == n and not any(isinstance(p, Tensor) for p in part):
            return [part[row] for row in rows.tolist()]
        return _rebuild(part, pick)

    return pick(batch)


def _rebuild(part: Any, change: Callable[[Any], Any]) -> Any:
    """Return a container of the same type with each of its parts changed; anything else as it is."""
    if isinstance(part, Mapping):
        items = {key: change(value) for key, value in part.items()}
        return items if type(part) is dict else type(part)(items)  # type: ignore[call-arg]
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*map(change, part))
    if isinstance(part, (tuple, list)):
        return type(part)(map(change, part))
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        names = [field.name for field in dataclasses.fields(part) if field.init]
        return dataclasses.replace(part, **{name: change(getattr(part, name)) for name in names})
    return part


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on `device`."""
    return map_tensors(lambda tensor: tensor.to(device), batch)


def device_of(module: torch.nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer (the CPU if it has none)."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return half precision as float32, anything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def single_sample(batch: Any, place: int) -> Any:
    """Return one sample of a batch, without its leading dimension.

    >>> single_sample({"x": torch.arange(3), "scale": torch.tensor(2.0)}, 1)
    {'x': tensor(1), 'scale': tensor(2.)}
    """

    def first(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part[0] if part.ndim else part
        return part[0] if is_ragged(part) else _rebuild(part, first)

    return first(slice_samples(batch, place, place + 1))


def main_tensor(value: Any, lead: int = 0) -> Tensor:
    """Return the tensor of a model input that is shown and explained.

    Of those with more than `lead` dimensions and no "mask" in their name: the largest with floats, else the largest.

    Args:
        value: a model's inputs.
        lead: 1 for a batch, 0 for one sample.

    Raises:
        ValueError: there is no tensor.
    """
    if isinstance(value, Ragged) and len(value) == 1 and lead:
        return value[0][None]
    held = list(_named_tensors(value, ""))
    if not held:
        raise ValueError(f"inputs: expected at least one tensor, got {type(value).__name__}")
    wanted = [tensor for name, tensor in held if tensor.ndim > lead and "mask" not in name.lower()]
    candidates = wanted or [tensor for _, tensor in held]
    floats = [tensor for tensor in candidates if tensor.is_floating_point()]
    return max(floats or candidates, key=Tensor.numel)


def _named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _named_tensors(part, str(key))
    else:
        yield from ((name, tensor) for tensor in tensors(value))


def is_zeros_and_ones(tensor: Tensor) -> bool:
    """Say whether every value is 0 or 1."""
    return bool(((tensor == 0) | (tensor == 1)).all())
