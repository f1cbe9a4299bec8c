"""Attribution to input features: callables `attributor(model, inputs, target, task) -> Explanation`."""

from lightning_interp.attribution.attributor import Attributor, ExplainsAllClasses, RanksPositions, importance
from lightning_interp.attribution.cam import (
    CAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    grad_cam,
    grad_cam_plus_plus,
    last_map_layer,
)
from lightning_interp.attribution.deconvnet import DeconvNet, GuidedBackprop, strongest
from lightning_interp.attribution.engine.single_pass import explain, explain_outputs
from lightning_interp.attribution.engine.target import (
    Score,
    Target,
    label_probability,
    log_probability,
    logit,
    probability,
    select,
)
from lightning_interp.attribution.integrated_gradients import IntegratedGradients
from lightning_interp.attribution.kernel_shap import KernelSHAP
from lightning_interp.attribution.lime import LIME, by_width
from lightning_interp.attribution.lrp import LRP
from lightning_interp.attribution.metrics.faithfulness import (
    DeadMaps,
    DeletionArea,
    InsertionArea,
    dead,
    deletion_curve,
    insertion_curve,
)
from lightning_interp.attribution.metrics.localization import (
    BestLocalizationError,
    EnergyInside,
    LocalizationError,
    PointingGame,
    box_overlap,
    boxes_to_masks,
    energy_inside,
    localization_error,
    pointing,
)
from lightning_interp.attribution.metrics.rank_correlation import flat_map, rank_correlation
from lightning_interp.attribution.metrics.sanity import last_weights, reinitialized, sanity_similarity
from lightning_interp.attribution.metrics.trivial_maps import Centre, Edges
from lightning_interp.attribution.occlusion import Occlusion
from lightning_interp.attribution.perturbed.coalitions import any_size, bernoulli
from lightning_interp.attribution.perturbed.local_models import LocalModels
from lightning_interp.attribution.perturbed.regions import Grid, Superpixels
from lightning_interp.attribution.saliency import InputXGradient, Saliency
from lightning_interp.attribution.score_cam import ScoreCAM
from lightning_interp.attribution.smoothgrad import SmoothGrad

__all__ = [
    "CAM",
    "LIME",
    "LRP",
    "Attributor",
    "BestLocalizationError",
    "Centre",
    "DeadMaps",
    "DeconvNet",
    "DeletionArea",
    "Edges",
    "EnergyInside",
    "ExplainsAllClasses",
    "GradCAM",
    "GradCAMPlusPlus",
    "Grid",
    "GuidedBackprop",
    "HiResCAM",
    "InputXGradient",
    "InsertionArea",
    "IntegratedGradients",
    "KernelSHAP",
    "LocalModels",
    "LocalizationError",
    "Occlusion",
    "PointingGame",
    "RanksPositions",
    "Saliency",
    "Score",
    "ScoreCAM",
    "SmoothGrad",
    "Superpixels",
    "Target",
    "any_size",
    "bernoulli",
    "box_overlap",
    "boxes_to_masks",
    "by_width",
    "dead",
    "deletion_curve",
    "energy_inside",
    "explain",
    "explain_outputs",
    "flat_map",
    "grad_cam",
    "grad_cam_plus_plus",
    "importance",
    "insertion_curve",
    "label_probability",
    "last_map_layer",
    "last_weights",
    "localization_error",
    "log_probability",
    "logit",
    "pointing",
    "probability",
    "rank_correlation",
    "reinitialized",
    "sanity_similarity",
    "select",
    "strongest",
]
