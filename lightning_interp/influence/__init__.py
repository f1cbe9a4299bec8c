"""Attribution to training samples: callables `estimator(model, train, query, task) -> Influence`."""

from lightning_interp.influence.curvature import EKFAC, GaussNewton, IdentityCurvature, ProjectedGaussNewton
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.ensemble import Ensemble
from lightning_interp.influence.estimator import InfluenceFunction
from lightning_interp.influence.store import GradientStore, stored
from lightning_interp.influence.tracin import TracIn
from lightning_interp.influence.trak import TRAK

__all__ = [
    "EKFAC",
    "TRAK",
    "Damping",
    "Ensemble",
    "GaussNewton",
    "GradientStore",
    "IdentityCurvature",
    "InfluenceFunction",
    "ProjectedGaussNewton",
    "TracIn",
    "stored",
]
