"""Per-sample gradients of one batched backward against autograd, one sample at a time."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_interp import Task
from lightning_interp.data.batch import slice_samples
from lightning_interp.data.samples import Samples
from lightning_interp.influence.gradients.coverage import find_coverage
from lightning_interp.influence.gradients.per_sample import PerSampleGradients
from lightning_interp.influence.gradients.reader import Reader
from lightning_interp.network.undisturbed import capture, differentiable
from tests.influence.nets import (
    TASK,
    Loose,
    Mean,
    Positions,
    Reused,
    SequenceFirst,
    Sneaky,
    TiedTokens,
    per_sample,
)


def conv(layer: nn.Module, size: tuple[int, ...], channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, size), layer, nn.ReLU(inplace=True), nn.Flatten(2), Mean(), nn.Linear(channels, 3)
    )


def normed(layer: nn.Module, *size: int) -> nn.Module:
    """A normalisation between a convolution and a linear layer, its scale and shift away from one and zero."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    for name, buffer in layer.named_buffers():
        if name.startswith("running"):
            buffer.uniform_(0.5, 2)
    return nn.Sequential(nn.Unflatten(1, size), layer, nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))


NETS: dict[str, tuple[Any, int]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)), 6),
    "one input": (lambda: nn.Sequential(nn.Linear(1, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)), 1),
    "positions": (Positions, 24),
    "called twice": (Reused, 6),
    "sequence first": (SequenceFirst, 18),
    "conv1d, dilated": (lambda: conv(nn.Conv1d(2, 4, 3, dilation=2, padding=1), (2, 9), 4), 18),
    "conv2d, strided": (lambda: conv(nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 5, 5), 4), 50),
    "conv2d, grouped": (lambda: conv(nn.Conv2d(4, 6, (3, 1), groups=2), (4, 4, 3), 6), 48),
    "conv2d, same, circular": (
        lambda: conv(nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"), (2, 4, 4), 4),
        32,
    ),
    "conv2d, depthwise, no bias": (lambda: conv(nn.Conv2d(4, 4, 2, groups=4, bias=False), (4, 3, 3), 4), 36),
    "conv3d": (lambda: conv(nn.Conv3d(1, 3, 2, stride=(1, 2, 1)), (1, 3, 4, 3), 3), 36),
    "layer norm": (lambda: normed(nn.LayerNorm(4), 6, 4), 24),
    "layer norm over two dimensions": (lambda: normed(nn.LayerNorm((3, 4)), 2, 3, 4), 24),
    "layer norm without bias": (lambda: normed(nn.LayerNorm(4, bias=False), 6, 4), 24),
    "rms norm": (lambda: normed(nn.RMSNorm(4), 6, 4), 24),
    "group norm": (lambda: normed(nn.GroupNorm(2, 4), 4, 2, 3), 24),
    "batch norm of rows": (lambda: normed(nn.BatchNorm1d(24), 24), 24),
    "batch norm of images": (lambda: normed(nn.BatchNorm2d(4), 4, 2, 3), 24),
}


@pytest.mark.parametrize("name", NETS)
def test_equals_autograd_sample_by_sample(name: str) -> None:
    torch.manual_seed(0)
    make, width = NETS[name]
    net = make().double()
    coverage, worst = per_sample(net, (torch.randn(5, width, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])))
    assert worst < 1e-10
    assert coverage.left_out == {}
    assert coverage.fallback is None
    assert coverage.size == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", ["linear", "conv2d, grouped", "layer norm", "batch norm of images"])
def test_single_precision_is_right_to_five_digits(name: str) -> None:
    torch.manual_seed(0)
    make, width = NETS[name]
    _, worst = per_sample(make(), (torch.randn(5, width), torch.tensor([0, 1, 2, 1, 0])))
    assert worst < 1e-5


def test_tables_are_covered_without_their_padding() -> None:
    net = nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(20, 3)).double()
    tokens = torch.tensor([[1, 1, 2, 0, 0], [3, 1, 3, 3, 2], [6, 5, 4, 3, 0]])
    coverage, worst = per_sample(net, (tokens, torch.tensor([0, 2, 1])))
    assert worst < 1e-10
    assert coverage.blocks["0.weight"].layout == "table"
    assert coverage.left_out == {}


def test_a_table_tied_to_the_output_layer_is_one_block() -> None:
    net = TiedTokens().double()
    tokens = torch.tensor([[1, 1, 2], [3, 1, 3], [6, 5, 4]])
    coverage, worst = per_sample(net, (tokens, torch.tensor([0, 2, 6])))
    assert worst < 1e-10
    assert coverage.fallback is None
    assert set(coverage.blocks) == {"table.weight", "mix.weight", "head.bias"}
    assert coverage.size == sum(p.numel() for p in net.parameters())


def test_parameters_outside_layers_are_differentiated_by_torch_func() -> None:
    net = Loose().double()
    coverage, worst = per_sample(net, (torch.randn(4, 24, dtype=torch.float64), torch.tensor([0, 2, 1, 1])))
    assert worst < 1e-10
    assert coverage.fallback is not None
    assert [block.name for block in coverage.fallback.blocks] == ["weight", "position", "scale"]
    assert coverage.left_out == {}


def test_shared_and_doubly_used_weights_are_right_and_unused_ones_are_named() -> None:
    net = Sneaky().double()
    coverage, worst = per_sample(net, (torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])))
    assert worst < 1e-10
    assert coverage.fallback is not None
    assert [block.name for block in coverage.fallback.blocks] == ["twice.weight", "twice.bias"]
    assert coverage.blocks["tied.weight"].parameters == ("tied.weight",)
    assert coverage.left_out == {"unused.weight": 16, "unused.bias": 4}


class Attentive(nn.Module):
    """Fused attention behind a parameter that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.out = nn.Parameter(torch.randn(1, 6, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = (x.unflatten(1, (6, 4)) + self.position)[:, None]
        return self.out(F.scaled_dot_product_attention(x, x, x)[:, 0].mean(1))


def test_torch_func_goes_through_fused_attention_without_complaint() -> None:
    batch = (torch.randn(4, 24), torch.tensor([0, 2, 1, 1]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        coverage, worst = per_sample(Attentive(), batch)
    assert [str(w.message) for w in caught] == []
    assert worst < 1e-4
    assert coverage.fallback is not None


class Stubborn(nn.Module):
    """Goes another way by the values it sees, which `torch.func` cannot follow, with a parameter outside layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 1e9):
            return self.out(x)
        return self.out(x * self.scale)


def test_what_torch_func_cannot_follow_is_differentiated_one_by_one() -> None:
    net = Stubborn().double()
    coverage, worst = per_sample(net, (torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])))
    assert worst < 1e-10
    assert coverage.left_out == {}
    assert coverage.fallback is not None
    assert [block.name for block in coverage.fallback.blocks] == ["scale"]


@pytest.mark.parametrize(("kind", "width"), [(Loose, 24), (Stubborn, 4)])
def test_gradients_of_outputs_contracted_with_weights(kind: type[nn.Module], width: int) -> None:
    torch.manual_seed(0)
    net = kind().double()
    batch = torch.randn(4, width, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    weights = torch.randn(4, 3, dtype=torch.float64)
    with differentiable(net):
        coverage = find_coverage(net, TASK, batch)
        rows = PerSampleGradients(coverage.watched_model, batch).output_gradients(weights)
        for sample in range(4):
            value = (net(batch[0][sample : sample + 1]) * weights[sample]).sum()
            for name, block in coverage.blocks.items():
                held = [net.get_parameter(parameter) for parameter in block.parameters]
                grads = torch.autograd.grad(value, held, retain_graph=True)
                found = block.unpack(rows[name].gradients()[sample])
                for parameter, grad in zip(block.parameters, grads, strict=True):
                    assert torch.allclose(found[parameter], grad, atol=1e-12), parameter


class Passes:
    """Samples in each forward, and the number of backward passes, in their order."""

    def __init__(self, net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forwards: list[int] = []
        self.backwards = 0
        backward = torch.autograd.grad

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.backwards += 1
            return backward(*args, **kwargs)

        net.register_forward_pre_hook(lambda _, args: self.forwards.append(len(args[0])))
        monkeypatch.setattr(torch.autograd, "grad", counted)


@pytest.mark.parametrize(
    ("kind", "width", "batches", "backwards"),
    [
        (Positions, 24, [1, 1, 3], 3),  # each of two samples by autograd, then three together by the rules
        (SequenceFirst, 18, [1, 1, 3, 3], 4),  # once more, samples along the second dimension
        (Loose, 24, [1, 1, 3, 1], 4),  # once more under vmap
        (Stubborn, 4, [1, 1, 3, 1, 1, 1, 1], 6),  # vmap fails, then each of three samples alone
    ],
)
def test_nothing_is_run_twice(
    kind: type[nn.Module], width: int, batches: list[int], backwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = kind().double()
    passes = Passes(net, monkeypatch)
    with differentiable(net):
        coverage = find_coverage(net, TASK, (torch.randn(5, width, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])))
        assert (passes.forwards, passes.backwards) == (batches, backwards)
        Reader.of(coverage, Samples(TensorDataset(torch.randn(5, width), torch.zeros(5))))
        assert (passes.forwards, passes.backwards) == (batches, backwards)


@pytest.mark.parametrize(("kind", "width"), [(Positions, 24), (SequenceFirst, 18), (Loose, 24), (Stubborn, 4)])
def test_memory_per_sample_is_what_one_sample_takes(kind: type[nn.Module], width: int) -> None:
    net = kind().double()
    batch = torch.randn(5, width, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    with differentiable(net):
        coverage = find_coverage(net, TASK, batch)
        first = slice_samples(batch, 0, 1)
        with capture(net, [name for name, _ in net.named_modules()], lambda _, __, output: output.numel()) as outputs:
            gradients = PerSampleGradients(coverage.watched_model, first).loss_gradients()
    assert coverage.memory.factors == {name: block.stored_elements for name, block in gradients.items()}
    made = sum(map(sum, outputs.values())) + width + 1
    assert made <= coverage.memory.activations <= made + (width + 1) * (coverage.fallback is not None)


def test_one_coverage_serves_other_weights() -> None:
    torch.manual_seed(0)
    net, other = Loose().double(), Loose().double()
    batch = torch.randn(4, 24, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    with differentiable(net):
        coverage = find_coverage(net, TASK, batch)
        for parameter, new in zip(net.parameters(), other.parameters(), strict=True):
            parameter.data = new.data  # other tensors, as after a move to another device
        found = PerSampleGradients(coverage.watched_model, batch).loss_gradients()
    with differentiable(other):
        expected = PerSampleGradients(find_coverage(other, TASK, batch).watched_model, batch).loss_gradients()
    assert found.keys() == expected.keys()
    for name, gradients in expected.items():
        assert torch.equal(found[name].gradients(), gradients.gradients())


def test_chosen_layers_only() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    with differentiable(net):
        coverage = find_coverage(net, Task(kind="classes"), (torch.randn(3, 4), torch.tensor([0, 1, 2])), ["2"])
    assert list(coverage.blocks) == ["2.weight"]
    assert coverage.left_out == {"0.weight": 16, "0.bias": 4}
