"""Attribution to input features: callables `attributor(model, inputs, target, task) -> Explanation`."""

from lightning_interp.attribution.cam import CAM, GradCAM, GradCAMPlusPlus, grad_cam, grad_cam_plus_plus, last_map_layer
from lightning_interp.attribution.coalitions import any_size, bernoulli
from lightning_interp.attribution.deconvnet import DeconvNet, GuidedBackprop, strongest
from lightning_interp.attribution.integrated_gradients import IntegratedGradients
from lightning_interp.attribution.kernel_shap import KernelSHAP
from lightning_interp.attribution.lime import LIME, by_width
from lightning_interp.attribution.local_models import LocalModels
from lightning_interp.attribution.occlusion import Occlusion
from lightning_interp.attribution.one_pass import explain
from lightning_interp.attribution.parts import Grid, Superpixels
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
    "LIME",
    "DeconvNet",
    "GradCAM",
    "GradCAMPlusPlus",
    "Grid",
    "GuidedBackprop",
    "InputXGradient",
    "IntegratedGradients",
    "KernelSHAP",
    "LocalModels",
    "Occlusion",
    "Saliency",
    "Score",
    "SmoothGrad",
    "Superpixels",
    "Target",
    "any_size",
    "bernoulli",
    "by_width",
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
