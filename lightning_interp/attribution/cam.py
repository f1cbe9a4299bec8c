"""Class activation maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_interp.attribution.saliency import gradient
from lightning_interp.attribution.target import Target, recorded, select
from lightning_interp.batch import map_tensors, precise, take
from lightning_interp.capture import capture, differentiable, hooked, undisturbed
from lightning_interp.display import main_tensor
from lightning_interp.records import Explanation
from lightning_interp.task import Task


@dataclass(frozen=True)
class GradCAM:
    """Gradient-weighted class activation map of a convolutional layer.

    map = ReLU(Σ_k w_k A_k), w_k the mean over positions of ∂ logit_target / ∂A_k, A the layer's output; upsampled
    bilinearly to the input's size. No gradient is computed below the layer. The map is as coarse as the layer:
    on a 1 × 1 output it says nothing, and a map of zeros means that no position speaks for the target.

    Reference: Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization,
    2017.

    Args:
        layer: name of the layer, as in `named_modules`; when None, the last one in the forward whose output has
            more than one position.
    """

    layer: str | None = None

    def __post_init__(self) -> None:
        if self.layer is not None and not isinstance(self.layer, str):
            raise TypeError(f"GradCAM(layer=...): expected a layer's name or None, got {self.layer!r}")

    @property
    def name(self) -> str:
        """Tag of the method."""
        return "GradCAM" if self.layer is None else f"GradCAM_{self.layer}"

    def __call__(self, model: nn.Module, inputs: Any, target: Target, task: Task = Task()) -> Explanation:
        """Explain each sample of a batch by itself; the model is left as it was.

        Args:
            model: any module; it runs in eval mode.
            inputs: what `task.outputs(model, ...)` takes, on the model's device; images `(n, channels, H, W)`.
            target: class per sample `(n,)`, or a function outputs → `(n,)`.
            task: how to call the model.

        Raises:
            ValueError: the layer is unknown, was not called or gives no spatial map; or the target does not fit.
        """
        layer = self.layer or last_spatial_layer(model, inputs, task)
        if layer not in dict(model.named_modules()):
            raise ValueError(f"GradCAM(layer=...): {layer!r} names no layer of {type(model).__name__}")
        with differentiable(model):
            activations, scores = _from_layer(model, inputs, layer, target, task)
            raw = grad_cam(activations.detach(), gradient(scores, activations))
            size = main_tensor(inputs, lead=1).shape[-2:]
            maps = F.interpolate(precise(raw).relu()[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        return Explanation(self.name, maps.cpu(), recorded(target, len(maps)), layer)


def grad_cam(activations: Float[Tensor, "n c h w"], gradients: Float[Tensor, "n c h w"]) -> Float[Tensor, "n h w"]:
    """Return the map before its ReLU: Σ_k A_k · mean over positions of ∂s/∂A_k."""
    weights = gradients.mean(dim=(2, 3), keepdim=True)
    return (weights * activations).sum(1)


def last_spatial_layer(model: nn.Module, inputs: Any, task: Task = Task()) -> str:
    """Return the last submodule of a forward whose output `(n, channels, H, W)` has more than one position.

    Of nested modules that hand on the same tensor, the innermost is named.

    Raises:
        ValueError: there is none.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: list[tuple[str, Tensor]] = []

    def keep(layer: str, _: int, output: Tensor) -> None:
        if output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            found.append((layer, output))

    with undisturbed(model), torch.no_grad(), capture(model, names, keep):
        task.outputs(model, map_tensors(Tensor.clone, take(inputs, 0, 1)))
    if not found:
        raise ValueError("GradCAM: expected a layer with output (n, channels, H, W) and H·W > 1, found none")
    return _innermost(found)


def _innermost(found: list[tuple[str, Tensor]]) -> str:
    """Follow the last output down to the submodule that made it; children finish before their parent."""
    name, output = found[-1]
    for inner, same in reversed(found[:-1]):
        if inner.startswith(f"{name}.") and same.data_ptr() == output.data_ptr():
            name = inner
    return name


def _from_layer(model: nn.Module, inputs: Any, layer: str, target: Target, task: Task) -> tuple[Tensor, Tensor]:
    """Return the layer's output as a leaf, and the target's score computed from it."""
    leaves: list[Tensor] = []

    def hook(_: str, __: nn.Module, ___: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 4:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"GradCAM(layer={layer!r}): expected an output (n, channels, H, W), got {shape}")
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()

    with hooked(model, [layer], hook):
        scores = select(task.outputs(model, map_tensors(lambda t: t.detach().clone(), inputs)), target)
    if not leaves:
        raise ValueError(f"GradCAM(layer={layer!r}): expected a layer that forward calls, but it was not called")
    return leaves[-1], scores
