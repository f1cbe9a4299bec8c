"""Curvature of the training loss, from which influence takes its metric."""

from lightning_interp.influence.curvature.curvature import Curvature, Fitted, Inverse, Scorer, Shift
from lightning_interp.influence.curvature.ekfac import EKFAC
from lightning_interp.influence.curvature.gauss_newton import GaussNewton
from lightning_interp.influence.curvature.identity import IdentityCurvature
from lightning_interp.influence.curvature.projected import ProjectedGaussNewton

__all__ = [
    "EKFAC",
    "Curvature",
    "Fitted",
    "GaussNewton",
    "IdentityCurvature",
    "Inverse",
    "ProjectedGaussNewton",
    "Scorer",
    "Shift",
]
