"""How batches are read and models called when nobody says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_interp import Task
from lightning_interp.data.task import (
    call_model,
    infer_problem,
    loss_per_sample,
    predict_classes,
    read_inputs,
    read_targets,
    settle_kind,
)


def bce(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")


X, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("batch", "inputs", "targets"),
    [
        ((X, Y), X, Y),
        ([X, Y], X, Y),
        ((X, X, Y), (X, X), Y),
        ({"image": X, "label": Y}, {"image": X}, Y),
        ({"input_ids": Y, "attention_mask": Y, "labels": Y}, {"input_ids": Y, "attention_mask": Y}, Y),
        ({"x": X, "y": Y}, {"x": X}, Y),
    ],
)
def test_batches(batch: Any, inputs: Any, targets: Tensor) -> None:
    assert read_inputs(batch) is inputs or str(read_inputs(batch)) == str(inputs)
    assert read_targets(batch) is targets


@pytest.mark.parametrize("batch", [X, (X,), {"image": X}, {"label": 3, "x": X}])
def test_a_batch_without_target_is_named(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"pass task=Task\(targets=\.\.\.\)"):
        read_targets(batch)


class Named(nn.Module):
    def forward(self, image: Tensor, scale: float = 1.0) -> Any:
        return SimpleNamespace(logits=image * scale)


def test_models_are_called() -> None:
    assert call_model(nn.Identity(), X) is X
    assert call_model(Named(), {"image": X, "id": ["a"] * 4}) is not None
    assert torch.equal(call_model(Named(), {"image": X, "scale": 2.0}), 2 * X)
    assert torch.equal(call_model(Named(), {"pixels": X, "id": ["a"] * 4}), X)
    assert torch.equal(call_model(Named(), (X, 3.0)), 3 * X)
    with pytest.raises(ValueError, match="expected batch keys among forward's arguments"):
        call_model(Named(), {"left": X, "right": X})


@pytest.mark.parametrize("output", [{"logits": X}, (X, Y), SimpleNamespace(logits=X), X])
def test_logits_are_taken(output: Any) -> None:
    class Gives(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return output

    assert call_model(Gives(), X) is X


def test_an_output_without_tensor_is_named() -> None:
    class Gives(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"hidden": 3}

    with pytest.raises(ValueError, match="a mapping with keys hidden"):
        call_model(Gives(), X)


@pytest.mark.parametrize(
    ("outputs", "targets", "kind", "expected"),
    [
        (X, Y, "classes", lambda: F.cross_entropy(X, Y, reduction="none")),
        (X[:, :1], Y % 2, "binary", lambda: bce(X[:, 0], Y % 2)),
        (X[:, 0], (Y % 2).float(), "binary", lambda: bce(X[:, 0], Y % 2)),
        (X, X > 0, "multilabel", lambda: bce(X, X > 0).mean(1)),
        (X, X + 1, "regression", lambda: torch.ones(4)),
        (X[:, :1], Y * 0.3, "regression", lambda: (X[:, 0] - Y * 0.3) ** 2),
    ],
)
def test_losses(outputs: Tensor, targets: Tensor, kind: str, expected: Any) -> None:
    assert infer_problem(outputs, targets) == kind
    assert torch.allclose(loss_per_sample(outputs, targets), expected(), atol=1e-6)


def test_a_segmentation_loss_is_the_mean_over_positions() -> None:
    outputs, targets = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    expected = torch.stack([F.cross_entropy(outputs[i : i + 1], targets[i : i + 1]) for i in range(2)])
    assert torch.allclose(loss_per_sample(outputs, targets), expected)


def test_what_fits_nothing_is_named() -> None:
    with pytest.raises(ValueError, match=r"outputs \(4, 3\) and targets \(4, 7\)"):
        infer_problem(X, torch.zeros(4, 7))


def test_predictions() -> None:
    chosen, chance = predict_classes(X, "classes")
    assert chosen.tolist() == X.argmax(1).tolist()
    assert torch.allclose(chance, X.softmax(1).amax(1))
    chosen, chance = predict_classes(torch.tensor([[2.0], [-2.0]]), "binary")
    assert chosen.tolist() == [1, 0]
    assert torch.allclose(chance, torch.tensor([2.0, 2.0]).sigmoid())
    chosen, chance = predict_classes(torch.tensor([[2.0], [-2.0]]), "regression")
    assert chosen.tolist() == [1, 1]
    assert bool(chance.isnan().all())
    chosen, chance = predict_classes(X, "multilabel")
    assert torch.allclose(chance, X.sigmoid().amax(1))
    assert predict_classes(torch.randn(4, 1, 5, 5), None)[0].shape == (4,)


def test_the_kind_is_settled_by_many_targets() -> None:
    def batch(*targets: float) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(targets), 1), torch.tensor(targets)

    net, first = nn.Identity(), batch(0.0, 1.0)
    assert settle_kind(Task(), net, first, [first]).kind == "binary"
    assert settle_kind(Task(), net, first, [first, batch(0.0, 2.5)]).kind == "regression"
    assert settle_kind(Task(), net, batch(0.3), []).kind == "regression"
    assert settle_kind(Task(kind="binary"), net, first, [batch(2.5)]).kind == "binary"
    assert settle_kind(Task(), net, (torch.zeros(2, 3), torch.zeros(2, 7)), []).kind is None
    task = settle_kind(Task(), net, first, [first, batch(0.0, 2.5)])
    assert task.per_sample(*batch(1.0)).tolist() == [1.0]


def test_a_task_takes_functions_alone() -> None:
    with pytest.raises(TypeError, match=r"Task\(loss=...\): expected a function, got 'mse'"):
        Task(loss="mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Task\(kind=...\): expected one of"):
        Task(kind="ordinal")  # type: ignore[arg-type]
