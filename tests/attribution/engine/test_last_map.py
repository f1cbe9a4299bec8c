"""Which layer class activation maps are read from, and how a map comes to the input's size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_interp.attribution import GradCAM, last_map_layer
from lightning_interp.attribution.engine.last_map import at_inputs_size
from tests.attribution.nets import Pooled, Text, ViT


class Functional(nn.Module):
    """A functional ReLU, in place, behind the last convolution."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x).relu())
        return self.head(F.relu(x, inplace=self.in_place).mean((2, 3)))


class Residual(nn.Module):
    """Adds in place, as torchvision's blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y += x
        return self.relu(y)


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool, last_step: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 5)
        self.lstm, self.head = nn.LSTM(5, 6, batch_first=batch_first), nn.Linear(6, 3)
        self.batch_first, self.last_step = batch_first, last_step

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        states, _ = self.lstm(x if self.batch_first else x.transpose(0, 1))
        states = states if self.batch_first else states.transpose(0, 1)
        return self.head(states[:, -1] if self.last_step else states.mean(1))


class Frozen(nn.Module):
    """A backbone under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(self.conv(x).mean((2, 3)))


def tail(*parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(3))


def nested() -> nn.Module:
    return tail(
        nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU(inplace=True)), nn.Identity()
    )


def text_of_convolutions() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv, self.head = nn.Embedding(20, 5), nn.Conv1d(5, 6, 3, padding=1), nn.Linear(6, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(F.relu(self.conv(self.embed(ids).transpose(1, 2))).amax(2))

    return Net()


IMAGES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nested containers": (nested, "0.1"),
    "pooling before the head": (Pooled, "last"),
    "functional ReLU": (lambda: Functional(False), "conv2>relu"),
    "functional ReLU in place": (lambda: Functional(True), "conv2>relu"),
    "residual in place": (lambda: tail(Residual(), Residual()), "1.relu"),
    "backbone under no_grad": (Frozen, "conv"),
    "ViT, mean over patches": (lambda: ViT(cls=False), "norm"),
    "ViT, class token": (lambda: ViT(cls=True), "blocks.1.norm1"),
}
TEXTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "transformer, mean": (Text, "encoder.layers.1.norm2"),
    "transformer, first token": (lambda: Text(cls=True), "encoder.layers.0.norm2"),
    "convolutions": (text_of_convolutions, "conv>relu"),
    "LSTM, mean": (lambda: Recurrent(True, False), "lstm"),
    "LSTM, steps first": (lambda: Recurrent(False, False), "lstm"),
    "LSTM, last step": (lambda: Recurrent(True, True), "embed"),
}


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 16, 16)


def tokens(n: int = 3) -> Tensor:
    return torch.randint(1, 20, (n, 6))


TARGET = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("make", "expected", "given"),
    [
        pytest.param(*case, given, id=name)
        for given, cases in ((images, IMAGES), (tokens, TEXTS))
        for name, case in cases.items()
    ],
)
def test_the_layer_found(make: Callable[[], nn.Module], expected: str, given: Callable[[], Tensor]) -> None:
    net, x = make().eval(), given()
    net(x)
    assert last_map_layer(net, x, TARGET) == expected
    found = GradCAM()(net, x, TARGET)
    assert found.layer == expected
    assert found.maps.shape == (3, *(x.shape[2:] or x.shape[1:]))
    assert torch.allclose(found.maps, GradCAM(expected)(net, x, TARGET).maps, atol=1e-6)
    assert bool((found.maps > 0).any())


def test_the_map_of_an_overwritten_layer_is_of_its_own_values() -> None:
    net, x = Functional(False).eval(), images()
    expected = GradCAM()(net, x, TARGET).maps
    net.in_place = True
    assert torch.allclose(GradCAM()(net, x, TARGET).maps, expected, atol=1e-6)


def test_a_sample_without_a_gradient_does_not_choose_for_the_others() -> None:
    net, x = ViT(cls=True).eval(), images()
    counts = torch.tensor([0.0, 1.0, 1.0])
    found = GradCAM()(net, x, lambda outputs: outputs[:, 0] * counts)
    assert found.layer == "blocks.1.norm1"
    assert bool((found.maps[0] == 0).all())
    assert torch.allclose(found.maps[1:], GradCAM()(net, x[1:], torch.tensor([0, 0])).maps, atol=1e-6)


def test_a_dead_network_gets_its_last_map_and_zeros() -> None:
    net = Pooled().eval()
    nn.init.zeros_(net.head.weight)
    found = GradCAM()(net, images(), TARGET)
    assert found.layer == "last"
    assert bool((found.maps == 0).all())


def test_a_token_layer_far_below_the_last_is_found_and_read() -> None:
    """The outputs above are more than are kept."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.norm = nn.Conv2d(3, 4, 4, 4), nn.LayerNorm(4)
            self.above, self.head = nn.ModuleList(nn.PReLU() for _ in range(40)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.patches(x).flatten(2).transpose(1, 2)).cumsum(1)
            for part in self.above:
                x = part(x)
            return self.head(x[:, -1])

    net, x = Late().eval(), images()
    found = GradCAM()(net, x, TARGET)
    assert found.layer == "norm"
    assert torch.allclose(found.maps, GradCAM("norm")(net, x, TARGET).maps, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "positions", "size"),
    [
        ((2, 3, 16, 16), (4, 4), (16, 16)),
        ((2, 3, 16, 16), (16,), (16, 16)),  # a grid of 4 × 4 tokens
        ((2, 3, 16, 16), (17,), (16, 16)),  # and a class token
        ((2, 3, 8, 16), (37,), (8, 16)),  # 4 × 8 and five registers
        ((2, 1, 4, 8, 8), (2, 4, 4), (4, 8, 8)),
        ((2, 6), (6,), (6,)),
        ((2, 6), (7,), (6,)),
        ((2, 6), (3,), (6,)),
        ((2, 3, 12), (4,), (12,)),
        ((2, 12, 3), (12,), (12,)),
    ],
)
def test_maps_come_to_the_inputs_size(shape: Any, positions: Any, size: Any) -> None:
    maps = torch.rand(2, *positions)
    found = at_inputs_size(maps, torch.zeros(shape), "layer")
    assert found.shape == (2, *size)
    whole = maps[:, positions[0] - torch.Size(size).numel() :] if len(positions) == 1 and len(size) == 1 else maps
    if whole.shape == found.shape:
        assert torch.equal(found, whole)


def test_tokens_are_laid_out_row_by_row_without_those_in_front() -> None:
    maps = torch.cat([torch.full((1, 5), 9.0), torch.arange(32.0)[None]], 1)
    found = at_inputs_size(maps, torch.zeros(1, 3, 4, 8), "layer")
    assert torch.equal(found[0], torch.arange(32.0).view(4, 8))


@pytest.mark.parametrize(
    ("shape", "positions"), [((2, 3, 16, 16), (3,)), ((2, 3, 16, 16), (2, 4, 4)), ((2, 6), (2, 3))]
)
def test_what_does_not_fit_is_an_error(shape: Any, positions: Any) -> None:
    with pytest.raises(ValueError, match="layer='some'"):
        at_inputs_size(torch.rand(2, *positions), torch.zeros(shape), "some")
