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


def is_ragged(value: Any) -> bool:
    """Say whether a list holds samples of different sizes, not several inputs: images with as many channels.

    >>> is_ragged([torch.zeros(3, 8, 8), torch.zeros(3, 9, 7)]), is_ragged([torch.zeros(4, 3), torch.zeros(4)])
    (True, False)
    """
    if isinstance(value, Ragged):
        return True
    if type(value) is not list or len(value) < 2 or not all(isinstance(v, Tensor) and v.ndim == 3 for v in value):
        return False
    return len({image.shape[0] for image in value}) == 1 and len({image.shape for image in value}) > 1


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
        for value in batch:
            yield from tensors(value)
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
    return _rebuild(batch, lambda value: map_tensors(function, value))


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
    for length in _leading_dimensions(_mark_ragged(batch)):
        return length
    raise ValueError(
        f"batch: expected at least one tensor with a leading sample dimension, got {type(batch).__name__} without any"
    )


def _leading_dimensions(value: Any) -> Iterator[int]:
    """Yield the leading dimension of each tensor, and the length of each ragged list."""
    if is_ragged(value):
        yield len(value)
    elif isinstance(value, Tensor):
        if value.ndim:
            yield value.shape[0]
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _leading_dimensions(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _leading_dimensions(entry)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leading_dimensions(getattr(value, field.name))


def slice_samples(batch: Any, start: int, stop: int) -> Any:
    """Return samples `start` to `stop` of a batch; values without one row per sample are returned unchanged.

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
    if not any(_one_image_each(value, n) for value in batch[:-1]):
        return batch
    return tuple(Ragged(value) if _one_image_each(value, n) else value for value in batch)


def _one_image_each(value: Any, n: int) -> bool:
    return type(value) is list and len(value) == n and all(isinstance(v, Tensor) and v.ndim == 3 for v in value)


def _slice_value(value: Any, n: int, start: int, stop: int) -> Any:
    if isinstance(value, Tensor):
        return value[start:stop] if value.ndim and value.shape[0] == n else value
    if is_ragged(value):
        return Ragged(value[start:stop])
    if isinstance(value, list) and len(value) == n and not any(isinstance(v, Tensor) for v in value):
        return value[start:stop]
    return _rebuild(value, lambda entry: _slice_value(entry, n, start, stop))


def select_samples(batch: Any, rows: Int[Tensor, " m"], old: Tensor | None = None, new: Tensor | None = None) -> Any:
    """Return a copy of some samples of a batch, in the order of `rows`; one tensor may be replaced by another.

    Args:
        batch: of n samples.
        rows: indices of the samples, repeated where a sample is to be.
        old: a tensor of the batch.
        new: its replacement, with the rows of the result.

    >>> select_samples({"x": torch.arange(3), "name": ["a", "b", "c"]}, torch.tensor([2, 2]))
    {'x': tensor([2, 2]), 'name': ['c', 'c']}
    """
    batch = _mark_ragged(batch)
    n = count_samples(batch)

    def select(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value is old:
                return new
            return value.index_select(0, rows.to(value.device)) if value.ndim and value.shape[0] == n else value.clone()
        if is_ragged(value):
            # For a list of one image the model gets a tensor that is a view of that image.
            if new is not None and old is not None and old.data_ptr() == value[0].data_ptr():
                return Ragged(new.unbind())
            return Ragged([value[row].clone() for row in rows.tolist()])
        if isinstance(value, list) and len(value) == n and not any(isinstance(v, Tensor) for v in value):
            return [value[row] for row in rows.tolist()]
        return _rebuild(value, select)

    return select(batch)


def _rebuild(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a container of the same type with each of its entries changed; anything else as it is."""
    if isinstance(value, Mapping):
        items = {key: change(entry) for key, entry in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple takes its fields one by one
        return type(value)(*map(change, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(change, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: change(getattr(value, name)) for name in names})
    return value


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on `device`."""
    return map_tensors(lambda tensor: tensor.to(device), batch)


def device_of(module: torch.nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer (the CPU if it has none)."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in half precision as float32, any other as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def single_sample(batch: Any, index: int) -> Any:
    """Return one sample of a batch, without its leading dimension.

    >>> single_sample({"x": torch.arange(3), "scale": torch.tensor(2.0)}, 1)
    {'x': tensor(1), 'scale': tensor(2.)}
    """

    def first(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[0] if value.ndim else value
        return value[0] if is_ragged(value) else _rebuild(value, first)

    return first(slice_samples(batch, index, index + 1))


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
    candidates = list(_named_tensors(value, ""))
    if not candidates:
        raise ValueError(f"inputs: expected at least one tensor, got {type(value).__name__}")
    inputs = [tensor for name, tensor in candidates if tensor.ndim > lead and "mask" not in name.lower()]
    inputs = inputs or [tensor for _, tensor in candidates]
    floats = [tensor for tensor in inputs if tensor.is_floating_point()]
    return max(floats or inputs, key=Tensor.numel)


def _named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _named_tensors(entry, str(key))
    else:
        yield from ((name, tensor) for tensor in tensors(value))


def is_zeros_and_ones(tensor: Tensor) -> bool:
    """Say whether every value is 0 or 1."""
    return bool(((tensor == 0) | (tensor == 1)).all())
