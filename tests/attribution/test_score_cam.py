"""Score-CAM against a loop over channels, sample by sample, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_interp.attribution import GradCAM, ScoreCAM, explain, logit, probability
from tests.attribution.nets import Text, ViT
from tests.attribution.test_gradients import TARGET, small


def by_hand(net: Any, x: Tensor, target: int, of_probability: bool, baseline: Tensor | None = None) -> Tensor:
    """One image's map; the baseline's score is subtracted as the paper has it."""
    activations = net.last(net.conv2(net.pool(net.act(net.norm(net.conv1(x[None].clone()))))))[0]

    def score(image: Tensor) -> Tensor:
        logits = net(image[None].clone())[0]
        return (logits.softmax(0) if of_probability else logits)[target]

    increases = []
    for channel in activations:
        mask = F.interpolate(channel[None, None], x.shape[1:], mode="bilinear", align_corners=False)[0, 0]
        if bool(mask.max() > mask.min()):
            mask = (mask - mask.min()) / (mask.max() - mask.min())
        else:
            mask = torch.zeros_like(mask)
        increases.append(score(x * mask) - (0 if baseline is None else score(baseline)))
    weights = torch.stack(increases).softmax(0)
    total = sum(weight * channel for weight, channel in zip(weights, activations, strict=True))
    return F.interpolate(total.relu()[None, None], x.shape[1:], mode="bilinear", align_corners=False)[0, 0]


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("score", [probability, logit], ids=lambda score: score.__name__)
def test_it_is_the_papers_loop_with_any_baseline(score: Any, batch_size: int) -> None:
    net, x = small()
    found = ScoreCAM(score=score, batch_size=batch_size)(net, x, TARGET)
    for i in range(3):
        for baseline in (None, torch.zeros_like(x[0]), torch.randn_like(x[0])):
            expected = by_hand(net, x[i], int(TARGET[i]), score is probability, baseline)
            assert torch.allclose(found.maps[i], expected, atol=1e-12)
    assert found.layer == "last"
    assert bool((found.maps > 0).any())


def test_a_constant_channel_masks_all_and_a_layer_may_be_named() -> None:
    net, x = small()
    with torch.no_grad():
        net.conv2.weight[0] = 0
        net.conv2.bias[0] = 2.0
        found = ScoreCAM("last")(net, x, TARGET)
        assert torch.allclose(found.maps[1], by_hand(net, x[1], int(TARGET[1]), True), atol=1e-12)
    assert found.method == "ScoreCAM_last"
    assert ScoreCAM(score=logit).name == "ScoreCAM_of_logit"


def test_no_more_than_batch_size_copies_at_a_time_and_the_first_pass_is_shared() -> None:
    net, x = small()
    sizes: list[int] = []
    net.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    score_cam, grad_cam = explain([ScoreCAM(batch_size=5), GradCAM()], net, x, TARGET)
    assert sizes == [3, 5, 5, 5, 5, 4]  # 3 samples × 8 channels
    assert score_cam.layer == grad_cam.layer


def test_a_function_as_target_sees_the_whole_batch() -> None:
    net, x = small()

    def of_target(outputs: Tensor) -> Tensor:
        return outputs.softmax(1).gather(1, TARGET[:, None])[:, 0]

    found = ScoreCAM(batch_size=2)(net, x, of_target)
    assert torch.allclose(found.maps, ScoreCAM()(net, x, TARGET).maps, atol=1e-12)


@pytest.mark.parametrize("cls", [True, False])
def test_tokens_of_an_image_are_a_grid(cls: bool) -> None:
    found = ScoreCAM()(ViT(cls).eval(), torch.randn(2, 3, 8, 12), torch.tensor([0, 2]))
    assert found.maps.shape == (2, 8, 12)


class Steps(nn.Module):
    """A convolution over the steps of a sequence `(n, channels, steps)`, or `(n, steps, d)`."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.conv, self.head, self.channels_last = nn.Conv1d(3, 4, 3, padding=1), nn.Linear(4, 3), channels_last

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x.transpose(1, 2) if self.channels_last else x).mean(2))


@pytest.mark.parametrize("channels_last", [True, False])
def test_sequences_are_masked_step_by_step(channels_last: bool) -> None:
    net, x = Steps(channels_last).double(), torch.randn(2, 3, 7).double()
    found = ScoreCAM()(net, x.transpose(1, 2) if channels_last else x, torch.tensor([0, 2]))
    activations = net.conv(x)[0].detach()
    masks = (activations - activations.amin(1, True)) / (activations.amax(1, True) - activations.amin(1, True))
    masked = x[0] * masks[:, None]
    with torch.no_grad():
        weights = net(masked.transpose(1, 2) if channels_last else masked).softmax(1)[:, 0].softmax(0)
    assert torch.allclose(found.maps[0], (weights[:, None] * activations).sum(0).relu(), atol=1e-12)


def test_tokens_and_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="ScoreCAM: expected inputs of floats"):
        ScoreCAM()(Text().eval(), torch.randint(1, 20, (2, 5)), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"ScoreCAM\(batch_size=...\)"):
        ScoreCAM(batch_size=0)
    net, x = small()
    with pytest.raises(ValueError, match="layer='head': expected an output"):
        ScoreCAM("head")(net, x, TARGET)
