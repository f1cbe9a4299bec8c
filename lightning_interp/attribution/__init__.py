"""Attribution to input features: callables `attributor(model, inputs, target, task) -> Explanation`."""

from lightning_interp.attribution.cam import GradCAM, grad_cam, last_spatial_layer
from lightning_interp.attribution.saliency import Saliency
from lightning_interp.attribution.target import Target, select

__all__ = ["GradCAM", "Saliency", "Target", "grad_cam", "last_spatial_layer", "select"]
