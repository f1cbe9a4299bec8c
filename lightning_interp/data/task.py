"""Task: how to read a batch and how to call the model, by functions that a user may replace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_interp.data.batch import count_samples, is_zeros_and_ones, main_tensor, slice_samples
from lightning_interp.data.training_step import loss_of_training_step

LABEL_KEYS = ("labels", "label", "target", "targets", "y")
SAMPLES_TO_SETTLE = 256  # so many targets of a regression are hardly all 0 or 1
Problem = Literal["classes", "binary", "multilabel", "regression"]


def read_inputs(batch: Any) -> Any:
    """Return what the model is called with: all of a batch but its target.

    A tuple or list `(x, ..., y)` gives `x`, or a tuple if there are several. A mapping gives all entries
    but the label. A lone tensor is its own input.

    >>> read_inputs({"image": 1, "label": 2})
    {'image': 1}
    """
    if isinstance(batch, Mapping):
        label = _label_key(batch)
        return {key: batch[key] for key in batch if key != label}
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[0] if len(batch) == 2 else tuple(batch[:-1])
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def read_targets(batch: Any) -> Tensor:
    """Return the targets of a batch: the last of a tuple, or a mapping's `labels`, `label`, `target` or `y`.

    Raises:
        ValueError: the batch has no target that this function can recognise.
    """
    targets: Any = None
    if isinstance(batch, Mapping):
        label = _label_key(batch)
        targets = batch[label] if label is not None else None
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        targets = batch[-1]
    if isinstance(targets, Tensor):
        return targets
    raise ValueError(
        f"task: expected a batch (x, y) or a mapping with one of {', '.join(LABEL_KEYS)} holding a tensor,"
        f" got {_shape_of(batch)}; pass task=Task(targets=...)"
    )


def read_mask(batch: Any) -> Tensor | None:
    """Return which tokens of a batch count, `(n, tokens)`: a mapping's `attention_mask`; None where there is none.

    >>> read_mask({"input_ids": 1, "attention_mask": torch.tensor([[1, 1, 0]])})
    tensor([[ True,  True, False]])
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def explained_input(inputs: Any) -> Tensor:
    """Return the one tensor of a model's inputs that is shown and explained.

    Of those with more than one dimension and no "mask" in their name: the largest with floats, else the largest.
    """
    return main_tensor(inputs, lead=1)


def call_model(module: nn.Module, inputs: Any) -> Tensor:
    """Call the module and return its outputs, one tensor, such as logits `(n, classes)`.

    A mapping is passed as keywords (those that `forward` names; a single entry of another name as the
    first argument), a tuple as positional arguments. Of an output object `.logits` is taken, else `["logits"]`,
    else the first tensor of a tuple.

    Raises:
        ValueError: the module's output holds no tensor that this function can recognise.
    """
    if isinstance(inputs, Mapping):
        output = _call_with_keywords(module, inputs)
    elif isinstance(inputs, tuple):
        output = module(*inputs)
    else:
        output = module(inputs)
    return _logits(output)


def loss_per_sample(outputs: Tensor, targets: Tensor, kind: Problem | None = None) -> Float[Tensor, " n"]:
    """Return one loss per sample, for the given kind of problem or the one that `infer_problem` finds.

    Cross entropy for classes, binary cross entropy for binary and multi-label outputs, squared error for
    regression; means over the dimensions after the first (and after the classes).
    """
    kind = kind or infer_problem(outputs, targets)
    if kind == "classes":
        loss = F.cross_entropy(outputs, _class_indices(outputs, targets), reduction="none")
    elif kind == "regression":
        loss = F.mse_loss(outputs, targets.reshape(outputs.shape).to(outputs.dtype), reduction="none")
    else:
        targets = targets.reshape(outputs.shape).to(outputs.dtype)
        loss = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    return loss.flatten(1).mean(1) if loss.ndim > 1 else loss


def infer_problem(outputs: Tensor, targets: Tensor) -> Problem:
    """Return which problem the shapes and types of outputs and targets describe.

    >>> infer_problem(torch.zeros(4, 10), torch.tensor([1, 2, 3, 9]))
    'classes'
    >>> infer_problem(torch.zeros(4, 1), torch.tensor([0, 1, 1, 0]))
    'binary'
    >>> infer_problem(torch.zeros(4, 3), torch.eye(4)[:, :3])
    'multilabel'
    >>> infer_problem(torch.zeros(4), torch.tensor([.1, .7, 3., 2.]))
    'regression'

    Raises:
        ValueError: outputs and targets fit none of the four.
    """
    discrete = not (targets.is_floating_point() or targets.is_complex())
    one_output = outputs.ndim == 1 or (outputs.ndim == 2 and outputs.shape[1] == 1)
    if one_output and targets.numel() == outputs.shape[0]:
        return "binary" if is_zeros_and_ones(targets) else "regression"
    if targets.shape == outputs.shape:
        return "multilabel" if is_zeros_and_ones(targets) else "regression"
    if discrete and outputs.ndim >= 2 and _is_class_index(outputs, targets):
        return "classes"
    raise ValueError(
        "task: expected targets that fit the outputs (class indices (n,), or the outputs' own shape), got"
        f" outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} of {targets.dtype};"
        " pass task=Task(outputs=..., targets=..., loss=...)"
    )


@dataclass(frozen=True)
class Task:
    """How to read a batch and call the model. Replace any of the functions by your own.

    Args:
        inputs: batch → what the model is called with.
        targets: batch → targets, one row per sample.
        outputs: (module, inputs) → outputs, logits `(n, classes)` for a classifier.
        loss: (outputs, targets) → one loss per sample, `(n,)`, in the unit that influence then has.
        kind: "classes", "binary", "multilabel" or "regression"; from shapes and values of the targets when None.
        mask: batch → which tokens count, `(n, tokens)`, or None where all do.
        explained: what the model is called with → the one of its tensors that attributions explain.
        step: (module, batch) → the mean loss of a batch, of which influence then takes its gradients instead of `loss`
            (see `from_training_step`).

    >>> task = Task(outputs=lambda module, x: module(x)["head_b"])
    """

    inputs: Callable[[Any], Any] = read_inputs
    targets: Callable[[Any], Tensor] = read_targets
    outputs: Callable[[nn.Module, Any], Tensor] = call_model
    loss: Callable[[Tensor, Tensor], Any] = loss_per_sample  # LightningCLI reads unions and shapes as classes to make
    kind: Problem | None = None
    mask: Callable[[Any], Any] = read_mask
    explained: Callable[[Any], Tensor] = explained_input
    step: Callable[[nn.Module, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        for name in ("inputs", "targets", "outputs", "loss", "mask", "explained"):
            if not callable(getattr(self, name)):
                raise TypeError(f"Task({name}=...): expected a function, got {getattr(self, name)!r}")
        if self.step is not None and not callable(self.step):
            raise TypeError(f"Task(step=...): expected a function or None, got {self.step!r}")
        if self.kind not in (None, *get_args(Problem)):
            raise ValueError(f"Task(kind=...): expected one of {get_args(Problem)} or None, got {self.kind!r}")

    @classmethod
    def from_training_step(cls, **functions: Any) -> Task:
        """Return a Task whose loss is the module's own `training_step`, which must be a mean over samples.

        Influence then takes its gradients from that step. Curvature needs outputs and `loss` too, and they must agree
        with the step; where they do not, only estimators that need gradients alone can be used.

        Args:
            functions: the Task's other arguments.

        >>> Task.from_training_step(kind="classes").step.__name__
        'loss_of_training_step'
        """
        return cls(**{"step": loss_of_training_step, **functions})

    def losses(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Float[Tensor, " n"]]:
        """Return outputs, targets and the loss per sample of one batch; by training steps, of one sample each.

        Raises:
            ValueError: `loss` did not give one number per sample.
        """
        outputs, targets = self.outputs(module, self.inputs(batch)), self.targets(batch)
        return (
            outputs,
            targets,
            self.per_sample(outputs, targets) if self.step is None else self.one_by_one(module, batch),
        )

    def total(self, module: nn.Module, batch: Any) -> Float[Tensor, ""]:
        """Return the sum of the samples' losses; by a training step, n times its mean.

        Raises:
            ValueError: `loss` did not give one number per sample, or `step` not one number.
        """
        if self.step is None:
            return self.losses(module, batch)[2].sum()
        mean = self.step(module, batch)
        if mean.shape != ():
            raise ValueError(f"Task(step=...): expected one loss, shape (), got shape {tuple(mean.shape)}")
        return count_samples(batch) * mean

    def one_by_one(self, module: nn.Module, batch: Any) -> Float[Tensor, " n"]:
        """Return the loss of each sample, run alone."""
        return torch.stack([self.total(module, slice_samples(batch, i, i + 1)) for i in range(count_samples(batch))])

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, " n"]:
        """Return the loss of each sample.

        Raises:
            ValueError: `loss` did not give one number per sample.
        """
        if self.loss is loss_per_sample:
            return loss_per_sample(outputs, targets, self.kind)
        loss = self.loss(outputs, targets)
        if loss.shape != outputs.shape[:1]:
            raise ValueError(
                f"Task(loss=...): expected one loss per sample, shape ({outputs.shape[0]},),"
                f" got shape {tuple(loss.shape)}"
            )
        return loss

    def problem(self, outputs: Tensor, targets: Tensor | None) -> Problem | None:
        """Return the kind of problem: as given, else by `infer_problem`; None where that fails."""
        if self.kind is not None or targets is None:
            return self.kind
        try:
            return infer_problem(outputs, targets)
        except ValueError:
            return None


def settle_kind(task: Task, module: nn.Module, batch: Any, further: Iterable[Any]) -> Task:
    """Return the task with its kind decided once, so that a small batch is never taken for another kind of problem.

    Args:
        task: returned unchanged if it has a kind, or if `infer_problem` fails.
        module: the network, in eval mode.
        batch: a few samples.
        further: batches of about `SAMPLES_TO_SETTLE` samples, read only where the first targets are all 0 or 1: other
            values among them mean regression.
    """
    try:
        with torch.no_grad():
            outputs, targets = task.outputs(module, task.inputs(batch)), task.targets(batch)
        kind = task.kind or infer_problem(outputs, targets)
    except ValueError:
        return task
    unsure = task.kind is None and kind in ("binary", "multilabel") and targets.dtype is not torch.bool
    if unsure and not all(is_zeros_and_ones(task.targets(later)) for later in further):
        kind = "regression"
    return replace(task, kind=kind)


def predict_classes(outputs: Tensor, kind: Problem | None) -> tuple[Tensor, Tensor]:
    """Return the predicted class and its probability, `(n,)` each.

    For a one-logit binary output the class is 0 or 1; for multi-label and regression outputs it is the
    largest output. For a regression with one output it is 1, which means that output itself, not its negative. The
    probability is NaN for regression.
    """
    n = len(outputs)
    logits = outputs.reshape(n, -1) if outputs.ndim < 3 else outputs.flatten(2).mean(2)
    logits = logits.detach().float()
    unknown = logits.new_full((n,), torch.nan)
    if logits.shape[1] == 1:
        positive = logits[:, 0].sigmoid()
        if kind == "regression":
            return torch.ones_like(positive, dtype=torch.long), unknown
        return (logits[:, 0] > 0).long(), torch.maximum(positive, 1 - positive)
    classes = logits.argmax(1)
    if kind == "regression":
        return classes, unknown
    by_class = logits.sigmoid() if kind == "multilabel" else logits.softmax(1)
    return classes, by_class.gather(1, classes[:, None])[:, 0]


def probabilities(outputs: Tensor, kind: Problem | None) -> Float[Tensor, "n classes"]:
    """Return each class's probability; of a single logit, those of classes 0 and 1; each label's own for multi-label.

    Outputs with positions `(n, classes, ...)` are averaged over them first.
    """
    logits = (outputs.reshape(len(outputs), -1) if outputs.ndim < 3 else outputs.flatten(2).mean(2)).detach().float()
    if logits.shape[1] == 1:
        positive = logits.sigmoid()
        return torch.cat([1 - positive, positive], dim=1)
    return logits.sigmoid() if kind == "multilabel" else logits.softmax(1)


def _label_key(batch: Mapping[Any, Any]) -> str | None:
    return next((key for key in LABEL_KEYS if key in batch), None)


def _call_with_keywords(module: nn.Module, inputs: Mapping[Any, Any]) -> Any:
    parameters = inspect.signature(module.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return module(**inputs)
    keywords = {key: value for key, value in inputs.items() if key in parameters}
    if keywords or not inputs:
        return module(**keywords)
    input_tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    if len(input_tensors) == 1:
        return module(input_tensors[0])
    raise ValueError(
        f"task: expected batch keys among forward's arguments ({', '.join(parameters)}), got"
        f" {', '.join(map(str, inputs))}; pass task=Task(outputs=...)"
    )


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and isinstance(output, (tuple, list)):
        logits = next((value for value in output if isinstance(value, Tensor)), None)
    if isinstance(logits, Tensor):
        return logits
    raise ValueError(
        f"task: expected the model to return a tensor or something with `.logits`, got {_shape_of(output)};"
        " pass task=Task(outputs=...)"
    )


def _is_class_index(outputs: Tensor, targets: Tensor) -> bool:
    expected = (outputs.shape[0], *outputs.shape[2:])
    return tuple(targets.shape) in (expected, (*expected, 1))


def _class_indices(outputs: Tensor, targets: Tensor) -> Tensor:
    return targets.reshape(outputs.shape[0], *outputs.shape[2:]).long()


def _shape_of(thing: Any) -> str:
    if isinstance(thing, Tensor):
        return f"a tensor of shape {tuple(thing.shape)}"
    if isinstance(thing, Mapping):
        return f"a mapping with keys {', '.join(map(str, thing))}"
    if isinstance(thing, (tuple, list)):
        return f"a {type(thing).__name__} of {', '.join(type(value).__name__ for value in thing)}"
    return f"a {type(thing).__name__}"
