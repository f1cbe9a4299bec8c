"""Curvature of the training loss, from which influence takes its metric."""

from lightning_interp.influence.curvature.conjugate_gradient import ConjugateGradient
from lightning_interp.influence.curvature.curvature import Curvature, Fitted, Inverse, Scorer, Shift, Solver
from lightning_interp.influence.curvature.datainf import DataInf
from lightning_interp.influence.curvature.ekfac import EKFAC
from lightning_interp.influence.curvature.gauss_newton import GaussNewton
from lightning_interp.influence.curvature.hessian import Hessian
from lightning_interp.influence.curvature.identity import IdentityCurvature
from lightning_interp.influence.curvature.kfac import KFAC
from lightning_interp.influence.curvature.lissa import LiSSA
from lightning_interp.influence.curvature.projected import ProjectedGaussNewton

__all__ = [
    "EKFAC",
    "KFAC",
    "ConjugateGradient",
    "Curvature",
    "DataInf",
    "Fitted",
    "GaussNewton",
    "Hessian",
    "IdentityCurvature",
    "Inverse",
    "LiSSA",
    "ProjectedGaussNewton",
    "Scorer",
    "Shift",
    "Solver",
]
