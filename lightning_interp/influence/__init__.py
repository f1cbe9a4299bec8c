"""Attribution to training samples: callables `estimator(model, train, query, task) -> Influence`."""

from lightning_interp.influence.curvature import EKFAC, GaussNewton, IdentityCurvature, ProjectedGaussNewton
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.estimator import InfluenceFunction

__all__ = ["EKFAC", "Damping", "GaussNewton", "IdentityCurvature", "InfluenceFunction", "ProjectedGaussNewton"]
