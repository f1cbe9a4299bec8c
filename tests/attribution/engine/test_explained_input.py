"""Token ids explained at their embedding, and models of several inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_interp import Task
from lightning_interp.attribution import (
    DeconvNet,
    GradCAM,
    InputXGradient,
    IntegratedGradients,
    Occlusion,
    Saliency,
    SmoothGrad,
)
from tests.attribution.nets import Text

TARGET = torch.tensor([0, 2])


class Lookup(nn.Module):
    """Looks tokens up by a module, by a function or by two, and adds the ids' own count."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed, self.other = nn.Embedding(12, 4), nn.Embedding(12, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = F.embedding(ids, self.embed.weight) if self.how == "function" else self.embed(ids)
        if self.how == "positions first":
            embedded = self.other(torch.arange(ids.shape[1]).expand_as(ids)) + embedded
        if self.how == "twice":
            embedded = embedded + 0.1 * self.other(ids) + (ids > 3).float()[..., None]
        return self.head(torch.tanh(embedded).sum(1))


def ids() -> Tensor:
    return torch.tensor([[3, 5, 5, 1], [9, 0, 2, 7]])


def by_hand(net: Lookup, tokens: Tensor, shift: Tensor) -> Tensor:
    """The gradient at the embedding: what else is added stays as it is."""
    embedded = net.embed(tokens).detach().requires_grad_()
    score = net.head(torch.tanh(embedded + shift).sum(1)).gather(1, TARGET[:, None]).sum()
    return torch.autograd.grad(score, embedded)[0]


@pytest.mark.parametrize("how", ["module", "function", "positions first", "twice"])
def test_gradients_at_the_embedding(how: str) -> None:
    net, tokens = Lookup(how), ids()
    with torch.no_grad():
        shift = torch.zeros(2, 4, 4)
        if how == "positions first":
            shift = net.other(torch.arange(4).expand_as(tokens))
        if how == "twice":
            shift = 0.1 * net.other(tokens) + (tokens > 3).float()[..., None]
    g, embedded = by_hand(net, tokens, shift), net.embed(tokens).detach()
    assert torch.allclose(Saliency()(net, tokens, TARGET).maps, g.norm(dim=2), atol=1e-6)
    assert torch.allclose(InputXGradient()(net, tokens, TARGET).maps, (g * embedded).sum(2), atol=1e-6)


def test_integrated_gradients_between_embeddings_sum_to_the_rise() -> None:
    net, tokens = Lookup("module"), ids()
    found = IntegratedGradients(steps=64)(net, tokens, TARGET)
    zero = net.head(torch.zeros(2, 4))
    rise = (net(tokens) - zero).gather(1, TARGET[:, None])[:, 0]
    assert torch.allclose(found.maps.sum(1), rise, atol=1e-3)
    assert found.maps.shape == (2, 4)
    other = IntegratedGradients(steps=64, baseline=net.embed.weight[0].detach())(net, tokens, TARGET)
    assert float(other.maps[1, 1].abs()) < 1e-6  # its token is the baseline
    assert not torch.allclose(other.maps, found.maps, atol=1e-3)


def test_occlusion_puts_the_mask_token_in() -> None:
    net, tokens = Lookup("module"), ids()
    found = Occlusion(baseline=11)(net, tokens, TARGET)
    for position in range(4):
        covered = tokens.clone()
        covered[:, position] = 11
        fall = (net(tokens) - net(covered)).gather(1, TARGET[:, None])[:, 0]
        assert torch.allclose(found.maps[:, position], fall, atol=1e-6)


@pytest.mark.parametrize("method", [Saliency(), InputXGradient(), GradCAM(), DeconvNet()], ids=lambda m: m.name)
def test_padding_gets_nothing(method: Any) -> None:
    net, tokens = Text().eval(), torch.tensor([[4, 7, 2, 9], [8, 3, 0, 0]])
    mask = (tokens != 0).long()
    found = method(net, {"input_ids": tokens, "attention_mask": mask}, TARGET)
    assert bool((found.maps[1, 2:] == 0).all())
    assert bool((found.maps[1, :2] != 0).any())
    short = method(net, {"input_ids": tokens[1:, :2], "attention_mask": mask[1:, :2]}, TARGET[1:])
    if method.name != "GradCAM":  # whose weights are a mean over positions, padding among them
        assert torch.allclose(short.maps[0], found.maps[1, :2], atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        Saliency(),
        IntegratedGradients(steps=3, batch_size=3),
        SmoothGrad(draws=2, batch_size=3),
        Occlusion(batch_size=3),
    ],
    ids=lambda method: method.name,
)
def test_every_variant_of_a_sample_keeps_that_samples_mask(method: Any) -> None:
    net, tokens = Text().eval(), torch.tensor([[4, 7, 2, 9], [8, 3, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    both = method(net, {"input_ids": tokens, "attention_mask": mask}, TARGET).maps
    for i in range(2):
        alone = method(net, {"input_ids": tokens[i : i + 1], "attention_mask": mask[i : i + 1]}, TARGET[i : i + 1])
        assert torch.allclose(alone.maps[0], both[i], atol=1e-5)


class Two(nn.Module):
    """An image and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table, self.head = nn.Conv2d(1, 3, 3), nn.Linear(5, 3), nn.Linear(3, 3)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(image).mean((2, 3))) * self.table(table))


@pytest.mark.parametrize(
    "method",
    [Saliency(), InputXGradient(), IntegratedGradients(steps=3, batch_size=3), SmoothGrad(draws=2), Occlusion(2, 2)],
    ids=lambda method: method.name,
)
@pytest.mark.parametrize("named", [False, True])
def test_one_of_several_inputs_is_explained(method: Any, named: bool) -> None:
    net, image, table = Two(), torch.randn(2, 1, 6, 6), torch.randn(2, 5)
    task = Task(explained=lambda inputs: inputs["table"] if named else inputs[1])
    inputs = {"image": image, "table": table} if named else (image, table)
    of_image, of_table = method(net, inputs, TARGET).maps, method(net, inputs, TARGET, task=task).maps
    assert of_image.shape == ((2, 6, 6) if method.name.startswith("Occlusion") else (2, 1, 6, 6))
    assert of_table.shape == (2, 5)

    class OfTable(nn.Module):
        """Two, its image held fast."""

        def __init__(self, i: int) -> None:
            super().__init__()
            self.net, self.i = net, i

        def forward(self, table: Tensor) -> Tensor:
            return self.net(image[self.i : self.i + 1].expand(len(table), -1, -1, -1), table)

    for i in range(2):
        alone = method(OfTable(i), table[i : i + 1], TARGET[i : i + 1])
        assert torch.allclose(alone.maps[0], of_table[i], atol=1e-5)


def test_what_cannot_be_explained_is_named() -> None:
    class Counts(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return F.one_hot(ids, 12).float().sum(1)

    with pytest.raises(ValueError, match="none does"):
        Saliency()(Counts(), ids(), TARGET)
    with pytest.raises(ValueError, match="more than one dimension"):
        Saliency()(nn.Linear(1, 2), torch.randn(3), TARGET)
    one_of_two = Task(explained=lambda inputs: inputs[1], outputs=lambda net, inputs: net(inputs[0]))
    with pytest.raises(ValueError, match="expected outputs with a gradient"):
        Saliency()(nn.Linear(2, 3), (torch.randn(2, 2), torch.randn(2, 2)), TARGET, task=one_of_two)
