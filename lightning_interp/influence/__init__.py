"""Attribution to training samples: callables `estimator(model, train, query, task) -> Influence`."""

from lightning_interp.influence.curvature import EKFAC, GaussNewton
from lightning_interp.influence.estimator import InfluenceFunction
from lightning_interp.influence.logistic import (
    Factors,
    binary_factors,
    impact_by_size,
    leverage_corrected,
    multinomial_factors,
)
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
    "Factors",
    "GaussNewton",
    "InfluenceFunction",
    "LinearDatamodelingScore",
    "Retrained",
    "binary_factors",
    "group_scores",
    "impact_by_size",
    "leave_k_out",
    "leave_one_out",
    "leverage_corrected",
    "linear_datamodeling_score",
    "multinomial_factors",
]
