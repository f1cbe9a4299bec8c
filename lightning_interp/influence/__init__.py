"""Attribution to training samples: callables `estimator(model, train, query, task) -> Influence`."""

from lightning_interp.influence.curvature import (
    EKFAC,
    KFAC,
    ConjugateGradient,
    DataInf,
    GaussNewton,
    Hessian,
    IdentityCurvature,
    LiSSA,
    ProjectedGaussNewton,
)
from lightning_interp.influence.damping import Damping
from lightning_interp.influence.estimators.ensemble import Ensemble
from lightning_interp.influence.estimators.gradient_store import GradientStore, stored
from lightning_interp.influence.estimators.influence_function import InfluenceFunction
from lightning_interp.influence.estimators.tracin import TracIn
from lightning_interp.influence.estimators.trak import TRAK
from lightning_interp.influence.last_layer import LastLayer
from lightning_interp.influence.logistic import (
    Factors,
    binary_factors,
    impact_by_size,
    leverage_corrected,
    multinomial_factors,
)
from lightning_interp.influence.perturbation import Crafted, Front, Steps, craft, input_influence
from lightning_interp.influence.trajectory import Trajectory
from lightning_interp.influence.validation import (
    LinearDatamodelingScore,
    Retrained,
    group_scores,
    leave_k_out,
    leave_one_out,
    linear_datamodeling_score,
)

__all__ = [
    "EKFAC",
    "KFAC",
    "TRAK",
    "ConjugateGradient",
    "Crafted",
    "Damping",
    "DataInf",
    "Ensemble",
    "Factors",
    "Front",
    "GaussNewton",
    "GradientStore",
    "Hessian",
    "IdentityCurvature",
    "InfluenceFunction",
    "LastLayer",
    "LiSSA",
    "LinearDatamodelingScore",
    "ProjectedGaussNewton",
    "Retrained",
    "Steps",
    "TracIn",
    "Trajectory",
    "binary_factors",
    "craft",
    "group_scores",
    "impact_by_size",
    "input_influence",
    "leave_k_out",
    "leave_one_out",
    "leverage_corrected",
    "linear_datamodeling_score",
    "multinomial_factors",
    "stored",
]
