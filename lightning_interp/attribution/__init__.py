"""Attribution to input features: callables `attributor(model, inputs, target, task) -> Explanation`."""

from lightning_interp.attribution.cam import CAM, GradCAM, GradCAMPlusPlus, grad_cam, grad_cam_plus_plus, last_map_layer
from lightning_interp.attribution.deconvnet import DeconvNet, GuidedBackprop, strongest
from lightning_interp.attribution.integrated_gradients import IntegratedGradients
from lightning_interp.attribution.occlusion import Occlusion
from lightning_interp.attribution.one_pass import explain
from lightning_interp.attribution.saliency import InputXGradient, Saliency
from lightning_interp.attribution.smoothgrad import SmoothGrad
from lightning_interp.attribution.target import (
    Score,
    Target,
    label_probability,
    log_probability,
    logit,
    probability,
    select,
)

__all__ = [
    "CAM",
    "DeconvNet",
    "GradCAM",
    "GradCAMPlusPlus",
    "GuidedBackprop",
    "InputXGradient",
    "IntegratedGradients",
    "Occlusion",
    "Saliency",
    "Score",
    "SmoothGrad",
    "Target",
    "explain",
    "grad_cam",
    "grad_cam_plus_plus",
    "label_probability",
    "last_map_layer",
    "log_probability",
    "logit",
    "probability",
    "select",
    "strongest",
]
