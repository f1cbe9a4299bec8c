"""Training is bitwise the same with and without the callbacks; and the test that says so bites."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_interp import DataInfluence, InputAttribution, RepresentationSimilarity
from tests.models import Net, Shapes, loaders, trainer


class Observed(L.Callback):
    """Notes, at moments of training, what another callback could have changed."""

    def __init__(self) -> None:
        self.modes: list[list[bool]] = []
        self.random: list[float] = []
        self.grads: list[bool] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._note(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note(pl_module)

    def _note(self, module: L.LightningModule) -> None:
        self.modes.append([part.training for part in module.modules()])
        state = np.random.get_state(legacy=False)["state"]
        self.random.append(float(torch.get_rng_state().double().sum() + state["key"].sum() + state["pos"]))
        self.random.append(hash(random.getstate()))
        self.grads += [p.grad is None for p in module.parameters()]


def run(folder: Path, callbacks: list[L.Callback], workers: int, accumulate: int) -> dict[str, Any]:
    """Train, and return everything that must not change."""
    L.seed_everything(7, verbose=False)
    module, observed = Net(), Observed()
    fit = trainer(folder, callbacks=[observed, *callbacks], accumulate_grad_batches=accumulate)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*augmentation.*")
        fit.fit(module, *loaders(workers, augment=True))
    optimizer = fit.optimizers[0].state_dict()
    return {
        "weights": list(module.state_dict().values()),
        "optimizer": [v for group in optimizer["state"].values() for v in group.values()],
        "fed": module.fed,
        "metrics": [fit.callback_metrics[name] for name in sorted(fit.callback_metrics)],
        "metric names": sorted(fit.callback_metrics),
        "grads": [p.grad for p in module.parameters()],
        "modes": observed.modes,
        "random": observed.random,
        "grads are none": observed.grads,
        "rng": [torch.get_rng_state(), *np.random.get_state()[1:3], hash(random.getstate())],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()],
        "requires grad": [p.requires_grad for p in module.parameters()],
        "attributes": sorted(vars(module)),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [name for name in a if not same(a[name], b[name])]


def ours() -> list[L.Callback]:
    return [
        RepresentationSimilarity(samples=8, on_error="raise"),
        InputAttribution(samples=2, on_error="raise"),
        DataInfluence(queries=2, top=2, on_error="raise"),
    ]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_bitwise_unchanged(tmp_path: Path, workers: int, accumulate: int) -> None:
    bare = run(tmp_path / "bare", [], workers, accumulate)
    watched = run(tmp_path / "watched", ours(), workers, accumulate)
    assert differing(bare, watched) == []
    assert list((tmp_path / "watched").rglob("influence/report.html"))


class OwnGenerator(Shapes):
    """Augments by a generator that the dataset itself carries."""

    def __init__(self) -> None:
        super().__init__(24)
        self.random = np.random.default_rng(0)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        return image + 0.1 * float(self.random.normal()), label


def test_a_datasets_own_generator_is_not_advanced(tmp_path: Path) -> None:
    fed = []
    for callbacks in ([], ours()):
        L.seed_everything(7, verbose=False)
        module = Net()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*augmentation.*")
            trainer(tmp_path, callbacks=callbacks).fit(
                module, DataLoader(OwnGenerator(), 8, shuffle=True), loaders()[1]
            )
        fed.append(module.fed)
    assert same(*fed)


class Disturbing(L.Callback):
    def __init__(self, disturb: Callable[[L.Trainer, L.LightningModule], object]) -> None:
        self.disturb = disturb

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.disturb(trainer, pl_module)


def batch() -> Tensor:
    return torch.zeros(2, 1, 8, 8)


DISTURBANCES: dict[str, tuple[Callable[[L.Trainer, L.LightningModule], object], str]] = {
    "draws from torch": (lambda t, m: torch.rand(1), "rng"),
    "draws from numpy": (lambda t, m: np.random.rand(), "rng"),
    "draws from python": (lambda t, m: random.random(), "rng"),
    "iterates a loader": (lambda t, m: next(iter(t.val_dataloaders)), "rng"),
    "forward in train mode": (lambda t, m: m.train()(batch()), "weights"),
    "leaves eval mode": (lambda t, m: m.norm.eval(), "modes"),
    "backward into gradients": (lambda t, m: m(batch()).sum().backward(), "grads"),
    "leaves a hook": (lambda t, m: m.conv1.register_forward_hook(lambda *_: None), "hooks"),
    "freezes a parameter": (lambda t, m: m.conv1.weight.requires_grad_(False), "requires grad"),
    "updates a metric": (lambda t, m: m.log("train_loss", 1.0), "metrics"),
    "changes a weight": (lambda t, m: nn.init.zeros_(m.head.bias), "weights"),
    "sets an attribute": (lambda t, m: setattr(m, "probe", 1), "attributes"),
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("bare"), [], 0, 1)


@pytest.mark.parametrize("name", DISTURBANCES)
@pytest.mark.filterwarnings("ignore")
def test_the_comparison_bites(bare: dict[str, Any], tmp_path: Path, name: str) -> None:
    disturb, sees = DISTURBANCES[name]
    assert sees in differing(bare, run(tmp_path / "disturbed", [Disturbing(disturb)], 0, 1))


def test_two_bare_runs_are_equal(tmp_path: Path) -> None:
    assert differing(run(tmp_path / "a", [], 0, 3), run(tmp_path / "b", [], 0, 3)) == []
