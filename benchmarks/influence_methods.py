"""Our estimators in the benchmark of influence: name → scores `(q, n)`, positive is helpful."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.influence_data import Case
from lightning_interp.influence import (
    EKFAC,
    KFAC,
    TRAK,
    ConjugateGradient,
    Ensemble,
    GaussNewton,
    Hessian,
    IdentityCurvature,
    InfluenceFunction,
    LiSSA,
    ProjectedGaussNewton,
    TracIn,
    multinomial_factors,
)

Method = Callable[[Case], Tensor]
Make = Callable[[Case], Any]


def scored(make: Make, case: Case, top_k: int | None = None) -> Tensor:
    return make(case)(case.net, case.train, case.query, top_k=top_k).scores


def of_models(make: Make, case: Case) -> Ensemble:
    """Average over the networks of all seeds."""
    return Ensemble(make(case), [net.state_dict() for net in case.models])


def default(case: Case) -> InfluenceFunction:
    return InfluenceFunction(damping=case.trained)


def trained(curvature: Any, case: Case) -> InfluenceFunction:
    """Damped by what the training was."""
    return InfluenceFunction(curvature, case.trained)


def shared(curvature: Any, case: Case) -> InfluenceFunction:
    """Damped by 0.1 × the mean eigenvalue."""
    return InfluenceFunction(curvature)


def tracin(case: Case) -> TracIn:
    return TracIn(case.checkpoints, case.rates)


def trak(case: Case, damping: float = 0.0) -> TRAK:
    return TRAK(dim=512, damping=damping)


def corrected(case: Case) -> Tensor:
    """Return scores of a logistic regression, corrected for leverage."""
    layer = case.net.get_submodule("fc2")
    weights = torch.cat([layer.get_parameter("weight"), layer.get_parameter("bias")[:, None]], dim=1).detach()
    train, query = (
        (torch.cat([x, torch.ones_like(x[:, :1])], dim=1), y) for x, y in (case.train.tensors, case.query.tensors)
    )
    return multinomial_factors(weights, train, query, case.damping, leverage=True).scores


MAKERS: dict[str, Make] = {
    "gradient dot product": partial(trained, IdentityCurvature()),
    "TracIn, 8 checkpoints": tracin,
    "TRAK, 512": trak,
    "TRAK, 512, damped": partial(trak, damping=0.03),
    "K-FAC": partial(shared, KFAC()),
    "EK-FAC, 512 columns": partial(shared, EKFAC(columns=512)),
    "EK-FAC": partial(shared, EKFAC()),
    "EK-FAC, all classes": partial(shared, EKFAC(columns=None)),
    "default": default,
    **{
        f"Gauss–Newton, {k} columns": partial(trained, GaussNewton(columns=k))
        for k in (64, 128, 256, 600, 1024, 2048, 4096)
    },
    "Gauss–Newton": partial(trained, GaussNewton()),
    **{f"projected Gauss–Newton, {k}": partial(trained, ProjectedGaussNewton(dim=k)) for k in (512, 1024)},
    **{f"CG, {k} steps": partial(trained, ConjugateGradient(iterations=k)) for k in (3, 10)},
    "LiSSA": partial(trained, LiSSA()),
    "Hessian": partial(trained, Hessian()),
}
AVERAGED = (
    "EK-FAC, 512 columns",
    "Gauss–Newton, 256 columns",
    "Gauss–Newton, 600 columns",
    "Gauss–Newton, 1024 columns",
)
OURS: Mapping[str, Method] = {
    **{name: partial(scored, make) for name, make in MAKERS.items()},
    **{f"{name}, 6 models": partial(scored, partial(of_models, MAKERS[name])) for name in AVERAGED},
    "TRAK, 512, damped, 6 models": partial(
        scored, lambda case: TRAK([net.state_dict() for net in case.models], 512, 0.03)
    ),
}
CORRECTED: Mapping[str, Method] = {"Hessian, corrected for leverage": corrected}
# As they run where there are many training samples
STREAMED: Mapping[str, Method] = {
    name: partial(scored, MAKERS[name], top_k=10)
    for name in ("gradient dot product", "EK-FAC, 512 columns", "EK-FAC", "Gauss–Newton, 1024 columns", "TRAK, 512")
}
