"""Do other packages give the same maps? `python -m benchmarks.attribution_agreement`.

First the golden network (float64), where definitions agree: the largest difference from captum's maps. Then what peers
make of networks that are written in other ways, measured one by one: a difference of maps is |a − b| / |b|.

Peers come from `pip install --no-deps -r benchmarks/requirements.txt`.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.stubs import load
from lightning_interp.attribution import (
    DeconvNet,
    GradCAM,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    Occlusion,
    Saliency,
    SmoothGrad,
)

Maps = Callable[[nn.Module, Tensor, Tensor], Tensor]
GOLDEN = Path(__file__).parents[1] / "tests" / "data" / "golden_attribution.npz"
RELUS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "modules": nn.ReLU,
    "one module reused": nn.ReLU,
    "functions": lambda: F.relu,
    "methods": lambda: Tensor.relu,
    "modules in place": lambda: nn.ReLU(inplace=True),
    "ReLU6 modules": nn.ReLU6,
}


class Net(nn.Module):
    """Two convolutions, BatchNorm and max pooling; its ReLUs as given, each its own or one for both."""

    def __init__(self, kind: str = "modules") -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, 1, 1)
        self.relu1: Any = RELUS[kind]()
        self.relu2: Any = self.relu1 if "reused" in kind else RELUS[kind]()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu1(self.norm(self.conv1(x))), 2)
        logits: Tensor = self.head(self.relu2(self.conv2(x)).mean((2, 3)))
        return logits


def network(kind: str = "modules") -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    net, x = Net(kind), 3 * torch.randn(6, 3, 16, 16)
    with torch.no_grad():
        net(x)
    return net.eval(), x, torch.arange(6) % 5


def golden() -> tuple[nn.Module, Tensor, Tensor]:
    held = dict(np.load(GOLDEN))
    convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU()]
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).double()
    net.load_state_dict({k.removeprefix("weights/"): torch.tensor(v) for k, v in held.items() if "/" in k})
    return net, torch.tensor(held["inputs"]), torch.tensor(held["target"])


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def said(call: Callable[[], Any]) -> str:
    """Return a number, or the name of what is raised."""
    try:
        found = call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return f"{found:.2g}" if isinstance(found, float) else str(found)


def ours(method: Callable[..., Any], net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    maps: Tensor = method(net, x, target).maps
    return maps


def captum(name: str, net: nn.Module, x: Tensor, target: Tensor, **options: Any) -> Tensor:
    found: Tensor = getattr(load("captum.attr"), name)(net).attribute(x.clone(), target=target, **options)
    return found.detach()


def captum_grad_cam(layer: str, net: nn.Module, x: Tensor, target: Tensor, **options: Any) -> Tensor:
    found = load("captum.attr").LayerGradCam(net, net.get_submodule(layer)).attribute(x, target=target, **options)
    return found.detach()[:, 0]


def grad_cam(layer: str, net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    wanted = [load("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(int(one)) for one in target]
    with load("pytorch_grad_cam.grad_cam").GradCAM(net, [net.get_submodule(layer)]) as cam:
        return torch.from_numpy(cam(x, wanted))


def grad_cam_guided(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    guided = load("pytorch_grad_cam.guided_backprop").GuidedBackpropReLUModel(net)
    maps = [guided(image[None].clone(), int(one)) for image, one in zip(x, target, strict=True)]
    return torch.from_numpy(np.stack(maps)).permute(0, 3, 1, 2)


def zennit(name: str, net: nn.Module, x: Tensor, target: Tensor, composite: str = "", **options: Any) -> Tensor:
    rules = getattr(load("zennit.composites"), composite)() if composite else None
    with getattr(load("zennit.attribution"), name)(net, composite=rules, **options) as found:
        maps: Tensor = found(x.clone(), torch.eye(5).to(x)[target])[1]
    return maps.detach()


GUIDED: dict[str, Maps] = {
    "ours": partial(ours, GuidedBackprop()),
    "captum": partial(captum, "GuidedBackprop"),
    "grad-cam": grad_cam_guided,
    "zennit": partial(zennit, "Gradient", composite="GuidedBackprop"),
}
DECONV: dict[str, Maps] = {
    "ours": partial(ours, DeconvNet()),
    "captum": partial(captum, "Deconvolution"),
    "zennit": partial(zennit, "Gradient", composite="DeconvNet"),
}


def on_the_golden_network() -> None:
    net, x, target = golden()
    cover = {"sliding_window_shapes": (3, 8, 8), "strides": (3, 4, 4), "baselines": 0.0}

    def upsampled(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        maps = captum_grad_cam("3", net, x, target, relu_attributions=True)
        return F.interpolate(maps[:, None], (32, 32), mode="bilinear", align_corners=False)[:, 0]

    pairs: dict[str, tuple[Callable[..., Any], Maps]] = {
        "saliency": (Saliency(), partial(captum, "Saliency", abs=False)),
        "input × gradient": (InputXGradient(), partial(captum, "InputXGradient")),
        "guided backpropagation": (GuidedBackprop(), partial(captum, "GuidedBackprop")),
        "DeconvNet": (DeconvNet(), partial(captum, "Deconvolution")),
        "integrated gradients": (
            IntegratedGradients(),
            partial(captum, "IntegratedGradients", n_steps=32, method="riemann_middle"),
        ),
        "Grad-CAM": (GradCAM(), upsampled),
        "occlusion": (
            Occlusion(8, 4),
            lambda net, x, target: captum("Occlusion", net, x, target, **cover)[:, 0],
        ),
    }
    print("| method | largest difference from captum | largest value |\n|---|---|---|")
    for name, (method, theirs) in pairs.items():
        mine, other = ours(method, net, x, target), theirs(net, x, target)
        print(f"| {name} | {float((mine - other).abs().max()):.1e} | {float(other.abs().max()):.1e} |")


def by_hand(kind: str, deconv: bool) -> Tensor:
    """Backward by transposed convolutions and unpooling."""
    net, x, target = network(kind)
    ceiling = 6.0 if "6" in kind else float("inf")
    with torch.no_grad():
        z1 = net.norm(net.conv1(x))
        pooled, places = F.max_pool2d(z1.clamp(0, ceiling), 2, return_indices=True)
        z2 = net.conv2(pooled)
        back = (net.head.weight[target] / 64)[:, :, None, None].expand_as(z2)
        back = back.relu() if deconv else back.relu() * (z2 > 0) * (z2 < ceiling)
        back = F.max_unpool2d(F.conv_transpose2d(back, net.conv2.weight, padding=1), places, [2, 2])
        back = back.relu() if deconv else back.relu() * (z1 > 0) * (z1 < ceiling)
        variance = net.norm.get_buffer("running_var")
        slope = net.norm.weight / (variance + net.norm.eps).sqrt()
        return F.conv_transpose2d(back * slope[:, None, None], net.conv1.weight, padding=1)


def away(run: Maps, given: Callable[[], tuple[nn.Module, Tensor, Tensor]], truth: Tensor) -> float:
    return apart(run(*given()), truth)


def changed_relus() -> None:
    for title, peers, deconv in (("guided backpropagation", GUIDED, False), ("DeconvNet", DECONV, True)):
        print(f"\n{title}: difference from the backward by hand\n")
        print("| ReLUs | " + " | ".join(peers) + " |\n|---|" + "---|" * len(peers))
        for kind in RELUS:
            truth = by_hand(kind, deconv)
            cells = [said(partial(away, run, partial(network, kind), truth)) for run in peers.values()]
            print(f"| {kind} | " + " | ".join(cells) + " |")
        truth = by_hand("modules", deconv)
        compiled = [said(partial(away, run, in_compiled, truth)) for run in peers.values()]
        print("| modules, compiled and run before | " + " | ".join(compiled) + " |")


def in_compiled() -> tuple[nn.Module, Tensor, Tensor]:
    net, x, target = network()
    compiled: Any = torch.compile(net, backend="eager")
    compiled(x)
    return compiled, x, target


def in_train_mode() -> None:
    """What a map owes to its neighbours in the batch, and what is left of the model."""
    print("\nA network in train mode with BatchNorm\n")
    print("| whose | the map changes with its neighbours by | running mean changed | mode after | `.grad` after |")
    print("|---|---|---|---|---|")
    runs: dict[str, Maps] = {
        "ours, saliency": partial(ours, Saliency()),
        "ours, Grad-CAM": partial(ours, GradCAM()),
        "captum, saliency": partial(captum, "Saliency", abs=False),
        "captum, Grad-CAM": partial(captum_grad_cam, "relu2", relu_attributions=True),
        "captum, integrated gradients": partial(captum, "IntegratedGradients", n_steps=8),
        "zennit, gradient": partial(zennit, "Gradient"),
        "grad-cam, Grad-CAM": partial(grad_cam, "relu2"),
        "grad-cam, guided backpropagation": grad_cam_guided,
    }
    for whose, run in runs.items():
        net, x, target = network()
        net.train()
        mean = net.norm.running_mean.clone()  # type: ignore[union-attr]
        first = run(net, x, target)[:1]
        moved = not torch.equal(net.norm.running_mean, mean)  # type: ignore[arg-type]
        mode, graded = net.training, any(p.grad is not None for p in net.parameters())
        net, x, target = network()
        net.train()
        again = run(net, torch.cat([x[:1], 5 * x[1:] + 2]), target)[:1]
        print(
            f"| {whose} | {apart(again, first):.2g} | {'yes' if moved else 'no'} | {'train' if mode else 'eval'} |"
            f" {'set' if graded else 'none'} |"
        )


def other_differences() -> None:
    net, x, target = network()
    raw = captum_grad_cam("relu2", net, x, target)
    print("\nGrad-CAM of the same layer: smallest and largest value, size")
    for whose, maps in {
        "ours": ours(GradCAM(), net, x, target),
        "captum's default": raw,
        "grad-cam": grad_cam("relu2", net, x, target),
    }.items():
        print(f"- {whose}: {float(maps.min()):.3g} to {float(maps.max()):.3g}, {tuple(maps.shape[1:])}")
    nn.init.zeros_(net.head.weight)
    print(f"- grad-cam of a dead map: {said(lambda: float(grad_cam('relu2', net, x, target).abs().max()))}")
    print("\ngrad-cam, a forward that raises IndexError inside `with GradCAM(...)`:", said(swallowed))

    net, x, target = network()
    fine = ours(IntegratedGradients(2048), net, x, target)
    print("\nIntegrated gradients at 32 steps: difference from 2,048 steps")
    for whose, run in {
        "ours": partial(ours, IntegratedGradients()),
        "captum's default": partial(captum, "IntegratedGradients", n_steps=32),
        "captum, riemann_middle": partial(captum, "IntegratedGradients", n_steps=32, method="riemann_middle"),
        "zennit": partial(zennit, "IntegratedGradients", n_iter=32),
    }.items():
        print(f"- {whose}: {said(partial(away, run, lambda: (net, x, target), fine))}")
    smooth(net, x, target)
    captums_lime()


def swallowed() -> str:
    net, x, _ = network()
    net.conv2.register_forward_pre_hook(lambda *_: [][1])
    with load("pytorch_grad_cam.grad_cam").GradCAM(net, [net.relu2]) as cam:
        cam(x, None)
    return "no error comes out"


def smooth(net: nn.Module, x: Tensor, target: Tensor) -> None:
    attr = load("captum.attr")

    def captums(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        tunnel = attr.NoiseTunnel(attr.Saliency(net))
        options = {"nt_type": "smoothgrad", "nt_samples": 25, "abs": False}
        maps: Tensor = tunnel.attribute(x.clone(), target=target, **options)
        return maps.detach()

    print("\nSmoothGrad: the first sample's map again; and with neighbours 20 times as large; σ ÷ range of the sample")
    for whose, run, noise in (
        ("ours", partial(ours, SmoothGrad()), "0.15"),
        ("captum's default", captums, f"{1 / float(x[0].max() - x[0].min()):.2g} (σ = 1, whatever the input)"),
        ("zennit's default", partial(zennit, "SmoothGrad"), "0.1"),
    ):
        first, again = (run(net, x, target)[:1] for _ in range(2))
        beside = run(net, torch.cat([x[:1], 20 * x[1:]]), target)[:1]
        print(f"- {whose}: {apart(again, first):.2g}; {apart(beside, first):.2g}; {noise}")


def captums_lime() -> None:
    """A linear function of 32 features, 16 of which count."""
    torch.manual_seed(0)
    net = nn.Linear(32, 2, bias=False)
    with torch.no_grad():
        net.weight.zero_()[0, :16] = 0.02 * torch.randn(16).sign() * (1 + 2 * torch.rand(16))
    attr, x = load("captum.attr"), torch.ones(1, 32)
    found = attr.Lime(net).attribute(x, target=0, n_samples=1000, perturbations_per_eval=250)[0].detach()
    kernel = load("captum.attr._core.lime").get_exp_kernel_similarity_function()
    weights = [float(kernel(x, (torch.arange(32) >= off).float()[None], None)) for off in (1, 16, 31)]
    error = float((found - net.weight[0]).abs().max())
    print("\ncaptum's LIME at its defaults, of a linear function with 16 coefficients of 0.02 to 0.06 among 32")
    print(f"- of the 16 it keeps {int((found[:16] != 0).sum())}; the largest error is {error:.2g}")
    print(f"- its kernel's weight with 1, 16 and 31 features switched off: {', '.join(f'{w:.2g}' for w in weights)}")


def limes_defaults() -> None:
    """Its kernel, and what it puts where a part is switched off."""
    torch.manual_seed(0)
    seen: list[Any] = []

    def classify(images: Any) -> Any:
        seen.append(images)
        return np.full((len(images), 2), 0.5)

    explainer = load("lime.lime_image").LimeImageExplainer(random_state=0)
    image = np.random.RandomState(0).rand(4, 4, 3)
    halves = (np.arange(4)[:, None] >= 2).astype(int).repeat(4, 1)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        explainer.explain_instance(image, classify, num_samples=20, segmentation_fn=lambda _: halves)
    covered = next(one for one in np.concatenate(seen) if not np.allclose(one[:2], image[:2]))
    mean = bool(np.allclose(covered[0, 0], image[:2].mean((0, 1))))
    found, ours = (float(f(0.5)) for f in (explainer.base.kernel_fn, lambda d: np.exp(-(d**2) / (2 * 0.25**2))))
    print(f"\nlime for images: weight at a distance of 0.5: {found:.3g}; exp(−d² / (2 · 0.25²)) is {ours:.3g}")
    print(f"- a part that is switched off takes its own mean colour: {'yes' if mean else 'no'}")


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    on_the_golden_network()
    changed_relus()
    in_train_mode()
    other_differences()
    limes_defaults()


if __name__ == "__main__":
    main()
