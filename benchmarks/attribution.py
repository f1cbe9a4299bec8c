"""What attribution costs beside other packages: `python -m benchmarks.attribution` (`--quick` for one round).

A ResNet-18-like network with an ImageNet stem (7 × 7 / 2 and max pooling) in eval mode, 32 images 3 × 64 × 64, one
process, one thread. Each cost is a ratio of CPU time to one forward and backward of that batch, parameters' gradients
included, taken just before it; rounds are interleaved, medians with quartiles. `floor` is what the forwards and
backwards to the input that a method needs at least cost by themselves, in the same rounds. Peak memory is that of a
process of its own, above what is held before.

Peers come from `pip install --no-deps -r benchmarks/requirements.txt`; one that is missing is said to be. torchvision
and ttach, which some import for other ends, are stubs here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.nets import ResNet18
from benchmarks.stubs import load
from benchmarks.timing import Work, cpu_seconds, peak_mb, spread
from lightning_interp import attribution
from lightning_interp.attribution import (
    CAM,
    GradCAM,
    GradCAMPlusPlus,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    Saliency,
    SmoothGrad,
    explain,
)

BATCH, SIDE, STEPS, PERTURBATIONS, GRID = 32, 64, 32, 1000, 8
FIVE = (Saliency(), InputXGradient(), CAM(), GradCAM(), GradCAMPlusPlus())


class Case:
    """The network, the images and the classes that are explained."""

    def __init__(self, n: int = BATCH) -> None:
        torch.manual_seed(0)
        self.net = ResNet18()
        self.images, self.target = torch.randn(n, 3, SIDE, SIDE), torch.arange(n) % 10
        with torch.no_grad():
            self.net(self.images)  # BatchNorm gets statistics
        self.net.eval()

    @property
    def last(self) -> nn.Module:
        return self.net.get_submodule("blocks.7.relu2")


def training(case: Case) -> None:
    case.net.zero_grad()
    case.net(case.images).gather(1, case.target[:, None]).sum().backward()


def forward(case: Case) -> None:
    with torch.no_grad():
        case.net(case.images)


def to_input(case: Case) -> None:
    """One forward, and one backward to the input alone."""
    case.net.requires_grad_(False)
    leaf = case.images.clone().requires_grad_()
    torch.autograd.grad(case.net(leaf).gather(1, case.target[:, None]).sum(), leaf)
    case.net.requires_grad_(True)


# captum


def captum(name: str, case: Case, **options: Any) -> Any:
    method = getattr(load("captum.attr"), name)(case.net)
    return method.attribute(case.images.clone(), target=case.target, **options)


def captum_grad_cam(case: Case) -> Any:
    attr = load("captum.attr")
    maps = attr.LayerGradCam(case.net, case.last).attribute(case.images, target=case.target, relu_attributions=True)
    return attr.LayerAttribution.interpolate(maps, (SIDE, SIDE), "bilinear")


def captum_smooth(case: Case, **options: Any) -> Any:
    attr = load("captum.attr")
    tunnel = attr.NoiseTunnel(attr.Saliency(case.net))
    return tunnel.attribute(
        case.images.clone(),
        nt_type="smoothgrad",
        nt_samples=STEPS,
        stdevs=0.15,
        target=case.target,
        abs=False,
        **options,
    )


def captum_lime(case: Case) -> Any:
    lime, mask = load("captum.attr").Lime(case.net), torch.from_numpy(squares())
    return lime.attribute(
        case.images[:1],
        target=case.target[:1],
        feature_mask=mask[None, None],
        n_samples=PERTURBATIONS,
        perturbations_per_eval=BATCH,
    )


# grad-cam


def grad_cam(case: Case) -> Any:
    targets = [load("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(int(label)) for label in case.target]
    with load("pytorch_grad_cam.grad_cam").GradCAM(case.net, [case.last]) as cam:
        return cam(case.images, targets)


def grad_cam_guided(case: Case) -> Any:
    """It takes one image at a time."""
    guided = load("pytorch_grad_cam.guided_backprop").GuidedBackpropReLUModel(case.net)
    return [guided(image[None].clone(), int(one)) for image, one in zip(case.images, case.target, strict=True)]


# zennit


def zennit(name: str, case: Case, composite: str | None = None, **options: Any) -> Any:
    rules = getattr(load("zennit.composites"), composite)() if composite else None
    with getattr(load("zennit.attribution"), name)(case.net, composite=rules, **options) as attributor:
        return attributor(case.images.clone(), torch.eye(10)[case.target])


# lime


def lime(case: Case) -> Any:
    explainer = load("lime.lime_image").LimeImageExplainer(random_state=0)

    def classify(images: Any) -> Any:
        with torch.no_grad():
            return case.net(torch.from_numpy(images).permute(0, 3, 1, 2).float()).softmax(1).numpy()

    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        return explainer.explain_instance(
            case.images[0].permute(1, 2, 0).double().numpy(),
            classify,
            labels=(0,),
            top_labels=None,
            num_samples=PERTURBATIONS,
            batch_size=BATCH,
            segmentation_fn=lambda _: squares(),
            hide_color=0,
        )


def squares() -> Any:
    """Return the image cut into GRID × GRID squares, numbered."""
    side = np.arange(SIDE) * GRID // SIDE
    return side[:, None] * GRID + side


def our_lime(case: Case) -> Any:
    return attribution.LIME()(case.net, case.images[:1], case.target[:1])


def ours(method: Callable[..., Any], case: Case) -> Any:
    return method(case.net, case.images, case.target)


def ours_together(case: Case) -> Any:
    return explain(FIVE, case.net, case.images, case.target)


Run = Callable[[Case], Any]
QUICK: dict[str, dict[str, Run]] = {
    "saliency": {"ours": partial(ours, Saliency()), "captum": partial(captum, "Saliency", abs=False)},
    "Grad-CAM": {"ours": partial(ours, GradCAM()), "captum": captum_grad_cam, "grad-cam": grad_cam},
    "saliency, input × gradient, CAM, Grad-CAM and Grad-CAM++ together": {"ours": ours_together},
    "guided backpropagation": {
        "ours": partial(ours, GuidedBackprop()),
        "captum": partial(captum, "GuidedBackprop"),
        "grad-cam": grad_cam_guided,
        "zennit": partial(zennit, "Gradient", composite="GuidedBackprop"),
    },
}
SLOW: dict[str, dict[str, Run]] = {
    "integrated gradients, 32 steps": {
        "ours": partial(ours, IntegratedGradients(steps=STEPS)),
        "captum": partial(captum, "IntegratedGradients", n_steps=STEPS),
        "captum, internal_batch_size=32": partial(
            captum, "IntegratedGradients", n_steps=STEPS, internal_batch_size=BATCH
        ),
        "zennit": partial(zennit, "IntegratedGradients", n_iter=STEPS),
    },
    "SmoothGrad, 32 draws": {
        "ours": partial(ours, SmoothGrad(draws=STEPS)),
        "captum": captum_smooth,
        "captum, nt_samples_batch_size=1": partial(captum_smooth, nt_samples_batch_size=1),
        "zennit": partial(zennit, "SmoothGrad", n_iter=STEPS),
    },
    "LIME, 1,000 perturbations of one image": {"ours": our_lime, "captum": captum_lime, "lime": lime},
}
# What a method needs at least: forwards alone, and forwards with a backward to the input; of the whole batch.
FLOORS = {
    "saliency": (0.0, 1),
    "Grad-CAM": (1.0, 0),
    "saliency, input × gradient, CAM, Grad-CAM and Grad-CAM++ together": (0.0, 1),
    "guided backpropagation": (0.0, 1),
    "integrated gradients, 32 steps": (2.0, STEPS),
    "SmoothGrad, 32 draws": (0.0, STEPS),
    "LIME, 1,000 perturbations of one image": (PERTURBATIONS / BATCH, 0),
}


def of_memory(method: str, whose: str) -> tuple[Work, Work]:
    """Return a warm-up on one image, and the work whose memory is asked for."""
    case = Case()
    return partial(case.net, case.images[:1]), partial((QUICK | SLOW)[method][whose], case)


def installed(runs: Mapping[str, Run]) -> dict[str, Run]:
    """Return those that work here, having run each on two images."""
    case, available = Case(2), {}
    for whose, run in runs.items():
        if run is our_lime and not hasattr(attribution, "LIME"):
            print(f"{whose}: left out (no LIME)")
            continue
        try:
            run(case)
            available[whose] = run
        except ImportError as error:
            print(f"{whose}: left out ({error})")
    return available


def compared(methods: Mapping[str, Mapping[str, Run]], case: Case, rounds: int) -> None:
    """Print a row for each way to compute each method."""
    works: dict[tuple[str, str], Work] = {}
    for method, runs in methods.items():
        works |= {(method, whose): partial(run, case) for whose, run in installed(runs).items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in works}
    floors: list[tuple[float, float]] = []
    for _ in range(rounds):
        for key, work in works.items():
            training_seconds = cpu_seconds(partial(training, case))
            times[key].append(cpu_seconds(work) / training_seconds)
            floors.append(
                (
                    cpu_seconds(partial(forward, case)) / training_seconds,
                    cpu_seconds(partial(to_input, case)) / training_seconds,
                )
            )
    alone, back = (statistics.median(column) for column in zip(*floors, strict=True))
    for (method, whose), values in times.items():
        forwards, backwards = FLOORS[method]
        least = forwards * alone + backwards * back
        over = statistics.median(values) / least - 1
        peak = peak_mb(of_memory, method, whose)
        print(f"| {method} | {whose} | {spread(values)} | {least:.2f} | {over:+.0%} | {peak:.0f} |", flush=True)


def bare(case: Case, rounds: int) -> None:
    """Print what the bare runs cost."""
    seconds: list[float] = []
    costs: dict[str, list[float]] = {"forward": [], "forward and backward to the input": [], "in train mode": []}
    runs: Sequence[Run] = (forward, to_input, in_train_mode)
    for _ in range(rounds):
        seconds.append(cpu_seconds(partial(training, case)))
        for cost, run in zip(costs.values(), runs, strict=True):
            cost.append(cpu_seconds(partial(run, case)) / seconds[-1])
    print(f"One forward and backward of {BATCH} images, in eval mode: {spread(seconds)} s; in units of it:")
    for name, cost in costs.items():
        print(f"- {name}: {spread(cost)}")


def in_train_mode(case: Case) -> None:
    case.net.train()
    training(case)
    case.net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of everything")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    case = Case()
    training(case)
    bare(case, 1 if quick else 15)
    print("\n| method | whose | forwards + backwards, median (quartiles) | floor | above it | peak MB |")
    print("|---|---|---|---|---|---|")
    compared(QUICK, case, 1 if quick else 15)
    compared(SLOW, case, 1 if quick else 3)


if __name__ == "__main__":
    main()
