"""A method of a class of the user's own gets what the package's own methods get."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
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
    importance,
)
from lightning_interp.attribution.results import Explanation
from lightning_interp.data.task import Task


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


def test_a_wrapper_gets_exactly_the_numbers_of_the_method_inside(tmp_path: Path) -> None:
    x = torch.randn(200, 12)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 20)
    methods = [Saliency(), Wrapped(Saliency())]
    callback = InputAttribution(methods, samples=4, score_every_n_epochs=1, on_error="raise")
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    L.Trainer(max_epochs=2, default_root_dir=tmp_path, callbacks=[callback], accelerator="cpu", **options).fit(
        Table(), loader, loader
    )
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


@pytest.mark.parametrize("method", [LIME(samples=20), KernelSHAP(samples=20)], ids=lambda method: method.name)
def test_all_classes_is_an_optional_method_of_any_class(method: Any) -> None:
    @dataclass(frozen=True)
    class Mine(Wrapped):
        def all_classes(self, model: nn.Module, inputs: Any, task: Any) -> Any:
            return self.method.all_classes(model, inputs, task)

    assert isinstance(method, ExplainsAllClasses)
    assert isinstance(Mine(method), ExplainsAllClasses)
    assert not isinstance(Saliency(), ExplainsAllClasses)
