"""Attribution to training samples: callables `estimator(model, train, query, task) -> Influence`."""

from lightning_interp.influence.curvature import (
    EKFAC,
    KFAC,
    ConjugateGradient,
    GaussNewton,
    Hessian,
    IdentityCurvature,
    LiSSA,
)
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.estimator import InfluenceFunction

__all__ = [
    "EKFAC",
    "KFAC",
    "ConjugateGradient",
    "Damping",
    "GaussNewton",
    "Hessian",
    "IdentityCurvature",
    "InfluenceFunction",
    "LiSSA",
]
