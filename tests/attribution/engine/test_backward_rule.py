"""A rule of one's own for the backward, here one that holds attention weights constant."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_interp.attribution import GradCAM, Saliency, explain
from lightning_interp.attribution.engine.backward_rule import BackwardRule
from lightning_interp.attribution.engine.relu_rules import DECONVNET, GUIDED


class Attending(nn.Module):
    """One head of attention over steps `(n, steps, d)`, and a linear layer of the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def weights(self, x: Tensor) -> Tensor:
        return (self.query(x) @ x.transpose(1, 2)).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.weights(x) @ x).mean(1))


class SoftmaxMode(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        return output.detach() if getattr(func, "__name__", "") == "softmax" else output


@dataclass(frozen=True)
class ConstantAttention:
    """No gradient flows through the weights of attention."""

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        with SoftmaxMode():
            yield


@dataclass(frozen=True)
class ThroughValues(Saliency):
    """The gradient through the values of attention alone."""

    @property
    def rule(self) -> BackwardRule:
        return ConstantAttention()


def test_a_rule_needs_no_base_class_and_changes_only_the_backward() -> None:
    net, x, target = Attending().double(), torch.randn(2, 5, 4).double(), torch.tensor([0, 2])
    sizes: list[int] = []
    outputs: list[Tensor] = []
    net.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    net.register_forward_hook(lambda _, __, output: outputs.append(output.detach().clone()))
    methods = [Saliency(), ThroughValues(), ThroughValues(), GradCAM("query")]
    saliency, first, second, _ = explain(methods, net, x, target)
    expected = net.weights(x).detach().mean(1)[:, :, None] * net.head.weight.detach()[target][:, None]
    assert torch.allclose(first.maps, expected, atol=1e-12)
    assert torch.equal(first.maps, second.maps)
    assert not torch.allclose(saliency.maps, expected, atol=1e-3)
    assert len(sizes) == 2
    assert torch.equal(outputs[0], outputs[1])


def test_rules_are_told_apart_by_equality() -> None:
    rules: list[Any] = [DECONVNET, GUIDED, ConstantAttention(), ConstantAttention()]
    assert all(isinstance(rule, BackwardRule) for rule in rules)
    assert len(set(rules)) == 3
