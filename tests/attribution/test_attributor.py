"""A method of a class of the user's own gets what the package's own methods get."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp import InputAttribution
from lightning_interp.attribution import (
    LIME,
    DeconvNet,
    ExplainsAllClasses,
    GradCAM,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    KernelSHAP,
    Occlusion,
    Saliency,
    SmoothGrad,
    explain,
    explain_outputs,
    importance,
)
from lightning_interp.attribution.engine.target import OfTarget
from lightning_interp.attribution.results import Explanation
from lightning_interp.data.task import Task
from tests.attribution.nets import Pooled, ViT


@dataclass(frozen=True)
class Wrapped:
    """Another method under a name of its own, without a base class."""

    method: Any
    name: str = "Mine"

    def __call__(self, model: nn.Module, inputs: Any, target: Any, task: Any) -> Explanation:
        return replace(self.method(model, inputs, target, task), method=self.name)


class Table(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def fit(callback: InputAttribution, folder: Path, epochs: int) -> None:
    x = torch.randn(200, 12)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 20)
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=[callback], accelerator="cpu", **options)
    trainer.fit(Table(), loader, loader)


def test_a_wrapper_gets_exactly_the_numbers_of_the_method_inside(tmp_path: Path) -> None:
    methods = [Saliency(), Wrapped(Saliency())]
    fit(InputAttribution(methods, samples=4, score_every_n_epochs=1, on_error="raise"), tmp_path, epochs=2)
    (path,) = tmp_path.rglob("scores.csv")
    values: dict[str, dict[str, list[str]]] = {"Saliency": {}, "Mine": {}}
    for row in csv.DictReader(path.read_text().splitlines()):
        group, method, *_ = row["tag"].split("/")
        if method in values:
            values[method].setdefault(group, []).append(row["value"])
    assert set(values["Mine"]) >= {"attribution_deletion", "attribution_insertion", "attribution_sanity"}
    assert values["Mine"] == values["Saliency"]


@pytest.mark.parametrize(
    ("method", "by_size"),
    [
        (Saliency(), True),
        (SmoothGrad(draws=2), True),
        (GuidedBackprop(), True),
        (DeconvNet(), True),
        (InputXGradient(), False),
        (IntegratedGradients(steps=2), False),
        (Occlusion(), False),
        (LIME(samples=20), False),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_gradients_are_ranked_by_size_and_contributions_by_value(method: Any, by_size: bool) -> None:
    net, x, target = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6), torch.arange(4) % 3
    for attributor in (method, Wrapped(method)):
        (explanation,) = explain([attributor], net, x, target)
        expected = explanation.maps.abs() if by_size else explanation.maps
        assert torch.equal(importance(attributor, explanation), expected)
        assert bool((explanation.maps < 0).any()) or isinstance(method, DeconvNet)


def test_a_method_may_rank_its_maps_itself() -> None:
    @dataclass(frozen=True)
    class Negated(Wrapped):
        def importance(self, maps: Tensor) -> Tensor:
            return -maps

    method = Negated(Saliency())
    explanation = method(nn.Linear(6, 3), torch.randn(2, 6), torch.tensor([0, 1]), Task())
    assert torch.equal(importance(method, explanation), -explanation.maps)


@pytest.mark.usefixtures("unchecked")
def test_maps_that_say_nothing_of_it_are_ranked_by_value_and_other_words_are_refused() -> None:
    maps = torch.tensor([[1.0, -2.0]])
    assert torch.equal(importance(GradCAM(), Explanation("M", maps, torch.tensor([0]))), maps)
    with pytest.raises(ValueError, match=r'ranked_by=...\): expected "value" or "size", got \'sign\''):
        Explanation("M", maps, torch.tensor([0]), ranked_by="sign")  # type: ignore[arg-type]


@dataclass(frozen=True)
class OfAllClasses(Wrapped):
    """One that explains all classes at once, and counts how often."""

    calls: list[int] = field(default_factory=list)

    def all_classes(self, model: nn.Module, inputs: Any, task: Any) -> Any:
        self.calls.append(len(inputs))
        return self.method.all_classes(model, inputs, task)


@pytest.mark.parametrize("method", [LIME(samples=20), KernelSHAP(samples=20)], ids=lambda method: method.name)
def test_all_classes_is_an_optional_method_of_any_class(method: Any) -> None:
    assert isinstance(method, ExplainsAllClasses)
    assert isinstance(OfAllClasses(method), ExplainsAllClasses)
    assert not isinstance(Saliency(), ExplainsAllClasses)


def test_a_callback_that_shows_several_classes_explains_them_at_once(tmp_path: Path) -> None:
    method = OfAllClasses(LIME(samples=20))
    fit(InputAttribution([method], samples=4, wrong=0, scored=0, classes=2, on_error="raise"), tmp_path, epochs=1)
    assert method.calls
    assert set(method.calls) == {4}


def counted(net: nn.Module) -> list[int]:
    """Return a list that grows by the number of samples with each forward."""
    sizes: list[int] = []
    net.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    return sizes


def predicted_class(outputs: Tensor) -> Tensor:
    assert not outputs.requires_grad
    return outputs.argmax(1)


@pytest.mark.parametrize(
    ("methods", "forwards"),
    [
        ([GradCAM(), Saliency()], 1),
        ([GradCAM()], 1),
        ([Saliency()], 1),
        ([GuidedBackprop(), Saliency(), GradCAM(), InputXGradient()], 2),
        ([Occlusion(8, 8, batch_size=4)], 3),
        ([], 1),
    ],
    ids=lambda value: "+".join(m.name for m in value) or "none" if isinstance(value, list) else None,
)
def test_outputs_and_the_target_come_from_the_forward_that_is_explained(methods: Any, forwards: int) -> None:
    net, x = Pooled().eval(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = net(x)
    sizes = counted(net)
    outputs, target, explanations = explain_outputs(methods, net, x, predicted_class)
    assert len(sizes) == forwards
    assert torch.equal(outputs, expected)
    assert not outputs.requires_grad
    assert torch.equal(target, expected.argmax(1))
    for found, alone in zip(explanations, explain(methods, net, x, expected.argmax(1)), strict=True):
        assert torch.equal(found.maps, alone.maps)
        assert torch.equal(found.target, alone.target)
        assert (found.method, found.layer, found.ranked_by) == (alone.method, alone.layer, alone.ranked_by)


def test_the_target_is_chosen_once_even_where_the_last_map_takes_a_second_forward() -> None:
    net, x, calls = ViT(cls=True).eval(), torch.randn(2, 3, 8, 8), []

    def choose(outputs: Tensor) -> Tensor:
        calls.append(outputs)
        return outputs.argmax(1)

    outputs, _, (found,) = explain_outputs([GradCAM()], net, x, choose)
    assert len(calls) == 1
    assert torch.equal(found.maps, GradCAM()(net, x, outputs.argmax(1)).maps)


def test_a_chosen_target_may_be_a_function_which_is_explained() -> None:
    net, x = Pooled().eval(), torch.randn(4, 3, 8, 8)

    def margin(outputs: Tensor) -> Tensor:
        return outputs[:, 0] - outputs[:, 1]

    _, target, (found,) = explain_outputs([Saliency()], net, x, lambda outputs: margin)
    assert target is margin
    assert torch.equal(found.maps, Saliency()(net, x, margin).maps)


def test_outputs_in_inference_mode_and_in_train_mode() -> None:
    net, x = Pooled().train(), torch.randn(4, 3, 8, 8)
    expected, _, (map_,) = explain_outputs([GradCAM()], net, x, predicted_class)
    assert net.training
    with torch.inference_mode():
        outputs, _, (found,) = explain_outputs([GradCAM()], net, x.clone(), predicted_class)
    assert torch.equal(outputs, expected)
    assert torch.equal(found.maps, map_.maps)


@dataclass(frozen=True)
class Squared:
    """A method that reads a shared pass, without a base class."""

    name: str = "Squared"
    goal: Any = OfTarget()  # noqa: RUF009
    at: str = "input"

    def read(self, result: Any, layer: str) -> Tensor:
        return result.gradient.square()

    def __call__(self, *_: Any, **__: Any) -> Explanation:
        raise AssertionError("shares the pass, and is not called")


@dataclass(frozen=True)
class Doubled(GradCAM):
    """A method that changes the call of the one that it inherits from."""

    def __call__(self, *args: Any, **options: Any) -> Explanation:
        explanation = super().__call__(*args, **options)
        return replace(explanation, maps=2 * explanation.maps)


@dataclass(frozen=True)
class Forwarding:
    """A wrapper that forwards every attribute that it lacks."""

    method: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def __call__(self, *args: Any, **options: Any) -> Explanation:
        explanation = self.method(*args, **options)
        return replace(explanation, maps=2 * explanation.maps)


def test_a_pass_is_shared_without_a_base_class_and_a_call_of_ones_own_counts() -> None:
    net, x, target = Pooled().eval(), torch.randn(4, 3, 8, 8), torch.arange(4)
    sizes = counted(net)
    squared, saliency = explain([Squared(), Saliency()], net, x, target)
    assert len(sizes) == 1
    assert torch.equal(squared.maps, saliency.maps.square())
    assert squared.ranked_by == "value"
    for method in (Doubled(), Forwarding(GradCAM())):
        doubled, grad_cam = explain([method, GradCAM()], net, x, target)
        assert torch.equal(doubled.maps, 2 * grad_cam.maps)


class Odd:
    """A method without a base class, of which one member is not what it should be."""

    name, at, goal, rule = "Odd", "input", OfTarget(), None

    def read(self, result: Any, layer: str) -> Any:
        return result.gradient

    def facts(self, result: Any, maps: Tensor) -> Any:
        return {}

    def __call__(self, *_: Any, **__: Any) -> Explanation:
        raise AssertionError("shares the pass, and is not called")


@pytest.mark.parametrize(
    ("member", "value", "message"),
    [
        ("read", lambda *_: torch.zeros(2, 4), r"Odd\.read: expected a tensor of 3 samples, got shape \(2, 4\)$"),
        ("read", lambda *_: torch.zeros(()), r"Odd\.read: expected a tensor of 3 samples, got shape \(\)$"),
        ("read", lambda *_: None, r"Odd\.read: expected a tensor of 3 samples, got None$"),
        ("facts", lambda *_: {"gap": 1.0}, r"Odd\.facts: gap: expected a tensor of 3 samples, got 1\.0$"),
        ("goal", [1], r"Odd\.goal: expected a hashable Goal, such as OfTarget\(\), got \[1\]$"),
        ("rule", {}, r"Odd\.rule: expected a hashable BackwardRule or None, got \{\}$"),
    ],
)
def test_what_a_method_gives_is_checked(member: str, value: Any, message: str) -> None:
    method = type("Odder", (Odd,), {member: value})()
    with pytest.raises(TypeError, match=message):
        explain([method], nn.Linear(4, 3), torch.randn(3, 4), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Saliency, r"methods: expected attributors such as Saliency\(\), got <class .*Saliency'>$"),
        (lambda *_, **__: torch.zeros(3, 4), r"<lambda>: expected an Explanation, got Tensor$"),
    ],
)
def test_what_is_no_attributor_is_refused(method: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        explain([Saliency(), method], nn.Linear(4, 3), torch.randn(3, 4), torch.tensor([0, 1, 2]))


def test_importance_has_the_shape_of_the_maps() -> None:
    explanation = explain([Odd()], nn.Linear(4, 3), torch.randn(3, 4), torch.tensor([0, 1, 2]))[0]
    method = type("Ranker", (), {"name": "Ranker", "importance": lambda self, maps: maps.sum(1)})()
    with pytest.raises(TypeError, match=r"Ranker\.importance: expected a tensor of shape \(3, 4\), got shape \(3,\)$"):
        importance(method, explanation)


def test_a_choice_of_targets_must_choose() -> None:
    with pytest.raises(TypeError, match="choose: expected class indices or a function of outputs, got None"):
        explain_outputs([Saliency()], nn.Linear(4, 3), torch.randn(3, 4), lambda outputs: None)  # type: ignore[arg-type,return-value]
