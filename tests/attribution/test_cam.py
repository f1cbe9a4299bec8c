"""Class activation maps against loops over positions, and the golden maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_interp.attribution import CAM, GradCAM, GradCAMPlusPlus, HiResCAM, grad_cam, grad_cam_plus_plus
from tests.attribution.nets import Pooled, Text
from tests.attribution.test_gradients import GOLDEN, TARGET, golden, small


def at_size(maps: Tensor, size: int = 32) -> Tensor:
    return F.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]


def test_golden() -> None:
    net, x, target = golden()
    raw = torch.tensor(GOLDEN["grad_cam_raw_no_relu"])
    assert torch.allclose(GradCAM()(net, x, target).maps, at_size(raw.relu()), atol=1e-12)
    assert torch.allclose(CAM()(net, x, target).maps, at_size(torch.tensor(GOLDEN["cam_raw"])), atol=1e-10)
    plus = torch.tensor(GOLDEN["grad_cam_plus_plus_after_relu"])
    assert torch.allclose(GradCAMPlusPlus()(net, x, target).maps, at_size(plus), atol=1e-12)


def test_grad_cam_plus_plus_is_the_papers_third_derivatives() -> None:
    a, g = torch.rand(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = torch.zeros(2, 4, 5, dtype=torch.float64)
    for i in range(2):
        for k in range(3):
            weight = 0.0
            for r in range(4):
                for c in range(5):
                    slope = float(g[i, k, r, c])
                    # Derivatives of exp(S) along A, without the common factor exp(S): g, g² and g³.
                    alpha = slope**2 / (2 * slope**2 + float(a[i, k].sum()) * slope**3)
                    weight += alpha * max(slope, 0.0)
            expected[i] += weight * a[i, k]
    assert torch.allclose(grad_cam_plus_plus(a, g), expected, atol=1e-12)
    assert bool((grad_cam_plus_plus(a, torch.zeros_like(g)) == 0).all())
    assert bool(grad_cam_plus_plus(a, g * float("nan")).isnan().all())


def test_grad_cam_of_volumes_and_sequences() -> None:
    for shape in ((2, 3, 4, 5, 6), (2, 3, 7)):
        a, g = torch.randn(shape).double(), torch.randn(shape).double()
        expected = sum(a[:, k] * g[:, k].flatten(1).mean(1).view(-1, *[1] * (len(shape) - 2)) for k in range(3))
        assert torch.allclose(grad_cam(a, g), expected, atol=1e-12)


def test_cam_is_grad_cam_up_to_the_number_of_positions_and_sums_to_the_logit() -> None:
    net, x = small()
    net.pool = nn.Identity()  # the map is as large as the image: nothing is lost on the way
    cam, logits = CAM()(net, x, TARGET), net(x).gather(1, TARGET[:, None])[:, 0]
    assert torch.allclose(cam.maps.mean((1, 2)) + net.head.bias[TARGET], logits, atol=1e-12)
    assert torch.allclose(cam.maps.relu() / 64, GradCAM()(net, x, TARGET).maps, atol=1e-12)
    assert bool((cam.maps < 0).any())


class Else(Pooled):
    """A second linear layer, an activation, or the maximum before the head."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.more = how, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.conv2(self.pool(self.act(self.norm(self.conv1(x))))))
        if self.how == "max":
            return self.head(x.amax((2, 3)))
        x = x.mean((2, 3))
        return self.head(self.more(x)) if self.how == "two" else self.head(x).square()


@pytest.mark.parametrize("how", ["two", "max", "square"])
def test_cam_refuses_other_networks(how: str) -> None:
    with pytest.raises(ValueError, match=r"CAM\(layer='last'\): expected a network whose outputs"):
        CAM()(Else(how).eval(), torch.randn(2, 3, 8, 8), TARGET[:2])


def test_cam_of_a_layer_that_is_not_the_last_is_refused() -> None:
    net, x = small()
    with pytest.raises(ValueError, match="expected a network"):
        CAM("conv2")(net, x, TARGET)


def test_grad_cam_over_tokens_has_one_number_per_token() -> None:
    net, ids = Text().eval(), torch.randint(1, 20, (2, 5))
    found = GradCAM("encoder.layers.0")(net, ids, torch.tensor([0, 1]))
    states: list[Tensor] = []

    def keep(*given: object) -> Tensor:
        states.append(given[2].detach().requires_grad_())
        return states[0]

    handle = net.encoder.layers[0].register_forward_hook(keep)
    score = net(ids).gather(1, torch.tensor([[0], [1]])).sum()
    handle.remove()
    (g,) = torch.autograd.grad(score, states[0])
    expected = (states[0] * g.mean(1, keepdim=True)).sum(2).relu()
    assert torch.allclose(found.maps, expected.detach(), atol=1e-6)


def test_hires_cam_is_activation_times_gradient_at_each_position() -> None:
    torch.manual_seed(0)
    body, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).double(), torch.randn(2, 3, 6, 6).double()
    net = nn.Sequential(body, nn.Flatten(), nn.Linear(4 * 36, 3).double())
    target = torch.tensor([2, 0])
    activations = body(x).detach()
    weights = net[2].weight[target].reshape(2, 4, 6, 6)
    found = HiResCAM()(net, x, target)
    assert found.layer == "0.1"
    assert torch.allclose(found.maps, (activations * weights).sum(1).relu().detach(), atol=1e-12)
    assert not torch.allclose(found.maps, GradCAM()(net, x, target).maps, atol=1e-3)


def test_hires_cam_is_grad_cam_under_global_average_pooling() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    x, target = torch.randn(2, 3, 8, 8).double(), torch.tensor([2, 0])
    assert torch.allclose(HiResCAM()(net, x, target).maps, GradCAM()(net, x, target).maps, atol=1e-12)
