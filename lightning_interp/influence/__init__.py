"""Attribution to training samples: callables `estimator(model, train, query, task) -> Influence`."""

from lightning_interp.influence.curvature import EKFAC, GaussNewton
from lightning_interp.influence.estimator import InfluenceFunction

__all__ = ["EKFAC", "GaussNewton", "InfluenceFunction"]
