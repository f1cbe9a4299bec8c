"""A model as a function of the one input that is explained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_interp.data.batch import is_ragged, select_samples
from lightning_interp.data.task import Task

NO_GRADIENT = "model: expected outputs with a gradient, got none (is part of forward under no_grad?)"


@dataclass(frozen=True, eq=False)
class ExplainedInput:
    """A model as a function of one of its inputs, sample by sample; its other inputs are fixed.

    Of floats, gradients are taken with respect to the input itself; of token ids, at the output of the embedding that
    they index, which is found in the forward.

    Args:
        model: in eval mode, inside `lightning_interp.network.undisturbed.explaining`.
        inputs: what `task.outputs(model, ...)` takes, on the model's device.
        task: how to call the model.
    """

    model: nn.Module
    inputs: Any
    task: Task

    @cached_property
    def raw(self) -> Tensor:
        """The explained tensor as the model gets it: floats `(n, ...)`, or token ids `(n, tokens)`."""
        if is_ragged(self.inputs) and len(self.inputs) > 1:
            raise ValueError("inputs: expected images of one size; explain images of different sizes one at a time")
        explained = self.task.explained(self.inputs)
        if explained.ndim < 2:
            raise ValueError(
                "inputs: expected an input (n, ...) of more than one dimension to explain, got"
                f" {tuple(explained.shape)}; choose another by task=Task(explained=...)"
            )
        return explained

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.raw.shape[0]

    @property
    def tokens(self) -> bool:
        """Whether token ids are explained."""
        return not self.raw.is_floating_point()

    @cached_property
    def values(self) -> Float[Tensor, "n *shape"]:
        """What gradients are taken with respect to: the raw floats, or the embedded tokens `(n, tokens, d)`."""
        if not self.tokens:
            return self.raw.detach().clone()
        embeddings: list[Tensor] = []

        def record(embedded: Tensor) -> Tensor:
            embeddings.append(embedded.detach().clone())
            return embedded

        with torch.no_grad():
            self._embedding(self.raw.clone(), record, self.everything)
        return embeddings[0]

    @property
    def everything(self) -> Int[Tensor, " n"]:
        """The index of each sample."""
        return torch.arange(self.n, device=self.raw.device)

    def outputs(self, values: Float[Tensor, "m *shape"], rows: Int[Tensor, " m"] | None = None) -> Tensor:
        """Return the model's outputs where `values` replace those of the samples `rows`.

        Args:
            values: floats like `self.values`; gradients flow to them.
            rows: the sample whose other inputs each row gets; all in order when None.
        """
        rows = self.everything if rows is None else rows
        if not self.tokens:
            return self.outputs_of(values, rows)
        ids = self.raw.index_select(0, rows)
        return self._embedding(ids, lambda embedded: values.to(embedded.dtype), rows)

    def outputs_of(self, raw: Tensor, rows: Int[Tensor, " m"] | None = None) -> Tensor:
        """Return the model's outputs where `raw`, floats or token ids, replaces the samples `rows`."""
        rows = self.everything if rows is None else rows
        return self.task.outputs(self.model, select_samples(self.inputs, rows, self.raw, raw))

    def with_leaf(self) -> tuple[Tensor, Tensor]:
        """Return the values as a leaf of the graph, and the outputs computed from it."""
        leaves: list[Tensor] = []

        def leaf(values: Tensor) -> Tensor:
            leaves.append(values.detach().clone().requires_grad_())
            return leaves[0].clone()  # the model may write into its input

        if self.tokens:
            outputs = self._embedding(self.raw.clone(), leaf, self.everything)
        else:
            outputs = self.outputs_of(leaf(self.raw))
        return leaves[0], outputs

    def without_padding(self, maps: Tensor) -> Tensor:
        """Return maps with zeros at the tokens that `task.mask` leaves out; maps of other inputs unchanged."""
        mask = self.task.mask(self.inputs) if self.tokens else None
        return maps if mask is None or mask.shape != maps.shape else maps * mask.to(maps.device)

    def seeds(self) -> list[int]:
        """Return a seed per sample, a hash of its values: equal samples get equal draws in every batch and run."""
        return [
            int.from_bytes(hashlib.sha256(sample.numpy().tobytes()).digest()[:7], "big")
            for sample in self.raw.detach().cpu().contiguous().flatten(1).view(torch.uint8)
        ]

    def _embedding(self, ids: Tensor, replace: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        with _AtEmbedding(ids, replace) as mode:
            outputs = self.outputs_of(ids, rows)
        if not mode.met_embedding:
            raise ValueError(
                f"inputs: expected floats, or token ids that an embedding of the model looks up as they are, got"
                f" {ids.dtype} that none does"
            )
        return outputs


def gradients(scores: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return ∂ Σ scores / ∂ each tensor: each sample's own gradient, since no score depends on another sample.

    Raises:
        ValueError: no gradient flows.
    """
    if not scores.requires_grad:
        raise ValueError(NO_GRADIENT)
    tensor_gradients = torch.autograd.grad(scores.sum(), list(tensors), allow_unused=True)
    if any(gradient is None for gradient in tensor_gradients):
        raise ValueError("model: expected outputs that depend on what is explained, but no gradient reaches it")
    return tensor_gradients


class _AtEmbedding(TorchFunctionMode):
    """Replaces the output of the first embedding of the given token ids, whichever module or function computes it."""

    def __init__(self, ids: Tensor, replace: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.ids, self.replace, self.met_embedding = ids, replace, False

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.met_embedding or func is not F.embedding:
            return output
        looked_up = args[0] if args else kwargs["input"]
        # Compared by value, since the model may pass on a copy.
        if looked_up.shape != self.ids.shape or not torch.equal(looked_up, self.ids):
            return output
        self.met_embedding = True
        return self.replace(output)
