"""DataInf against its definition written out, and in runs whose loss is that of the training step alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp import DataInfluence, Task
from lightning_interp.influence import Damping, DataInf, InfluenceFunction
from tests.influence.naive import gradients
from tests.models import Net, Shapes, trainer

LAYERS = {"0": ("0.weight", "0.bias"), "3": ("3.weight", "3.bias")}
SIZES = (2 * 9 + 2, 18 * 3 + 3)


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)).double()
    train, query = (TensorDataset(torch.randn(n, 1, 5, 5).double(), torch.arange(n) % 3) for n in (11, 4))
    return net, train, query


def transcribed(train: Tensor, query: Tensor, dampings: tuple[Tensor, ...]) -> Tensor:
    """(1/n) g_qᵀ [(1/n) Σ_j (g_j g_jᵀ + Λ)⁻¹] g_i, summed over layers, each inverse a matrix."""
    total = torch.zeros((), dtype=torch.float64)
    for left, right, damping in zip(query.split(SIZES, 1), train.split(SIZES, 1), dampings, strict=True):
        inverses = [torch.linalg.inv(torch.outer(g, g) + damping.expand(len(g)).diag()) for g in right]
        total = total + left @ torch.stack(inverses).mean(0) @ right.T
    return total / len(train)


def naive_gradients(net: nn.Module, data: TensorDataset) -> Tensor:
    return gradients(net, data, Task(kind="classes"))


def test_it_is_the_mean_of_the_damped_inverses(small: tuple[nn.Module, TensorDataset, TensorDataset]) -> None:
    net, train, query = small
    right, left = naive_gradients(net, train), naive_gradients(net, query)
    fitted = InfluenceFunction(DataInf(), damping=0.3).fit(net, train)
    dampings = tuple(torch.full((2,), 0.3, dtype=torch.float64))
    assert torch.allclose(fitted(query).scores, transcribed(right, left, dampings), rtol=1e-9)
    of_itself = transcribed(right, right, dampings).diagonal()
    assert torch.allclose(fitted.self_influence().scores, of_itself, rtol=1e-9)
    assert fitted.fitted.mean_eigenvalue == pytest.approx(float(right.square().mean()))


def test_damping_may_differ_by_parameter(small: tuple[nn.Module, TensorDataset, TensorDataset]) -> None:
    net, train, query = small
    torch.manual_seed(1)
    values = {name: torch.rand_like(p) + 0.1 for name, p in net.named_parameters()}
    flat = tuple(torch.cat([values[name].flatten() for name in names]) for names in LAYERS.values())
    influence = InfluenceFunction(DataInf(), Damping(values, "test"))(net, train, query)
    expected = transcribed(naive_gradients(net, train), naive_gradients(net, query), flat)
    assert torch.allclose(influence.scores, expected, rtol=1e-9)


def test_its_own_damping_is_a_share_of_each_layers_squared_gradients(
    small: tuple[nn.Module, TensorDataset, TensorDataset],
) -> None:
    net, train, query = small
    right = naive_gradients(net, train)
    expected = [0.1 * part.square().sum(1).mean() / part.shape[1] for part in right.split(SIZES, 1)]
    fitted = InfluenceFunction(DataInf()).fit(net, train)
    for names, damping in zip(LAYERS.values(), expected, strict=True):
        for name in names:
            assert fitted.damping.on(name) == pytest.approx(float(damping))
    scores = fitted(query).scores
    assert torch.allclose(scores, transcribed(right, naive_gradients(net, query), tuple(expected)), rtol=1e-9)


def test_gradients_of_zero_give_no_damping() -> None:
    data = TensorDataset(torch.zeros(4, 2), torch.arange(4) % 2)
    net = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"damping: expected gradients of .*, got zeros; pass damping="):
        InfluenceFunction(DataInf())(net, data, data)
    assert not InfluenceFunction(DataInf(), damping=1.0)(net, data, data).scores.any()


class Smoothed(Net):
    """Its loss is not that of its outputs by `Task()`."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.2)


@pytest.mark.parametrize(("module", "task"), [(Net, Task()), (Smoothed, Task.from_training_step())])
def test_runs_with_losses_of_outputs_or_of_training_steps_are_scored(
    module: type[Net], task: Task, tmp_path: Path
) -> None:
    estimator = InfluenceFunction(DataInf())
    callback = DataInfluence(queries=2, estimator=estimator, task=task, budget_seconds=1e-6, on_error="raise")
    fit = trainer(tmp_path, max_epochs=1, callbacks=[callback])
    with pytest.warns(UserWarning, match="40 of 48 training samples"):
        fit.fit(module(), DataLoader(Shapes(48), 8), DataLoader(Shapes(12, seed=1), 8))
    folder = Path(fit.log_dir) / "interp" / "influence"
    assert load_file(folder / "scores.safetensors")["scores"].shape == (2, 40)
    report = (folder / "report.html").read_text()
    assert "DataInf(samples=40)" in report
    assert "0.1 × each layer&#39;s mean squared gradient" in report
