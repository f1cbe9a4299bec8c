"""Our estimators in the benchmark of influence: name → scores `(q, n)`, positive is helpful."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.influence_data import Case
from lightning_interp.influence import EKFAC, GaussNewton, IdentityCurvature, InfluenceFunction

Method = Callable[[Case], Tensor]
Make = Callable[[Case], InfluenceFunction]


def scored(make: Make, case: Case, top_k: int | None = None) -> Tensor:
    return make(case)(case.net, case.train, case.query, top_k=top_k).scores


def averaged(method: Method, case: Case) -> Tensor:
    """Return the mean of the scores of networks trained from several seeds."""
    return torch.stack([method(dataclasses.replace(case, net=net)) for net in case.models]).mean(0)


def dot_product(case: Case) -> InfluenceFunction:
    return InfluenceFunction(IdentityCurvature(), damping=1.0)


def ekfac(case: Case, columns: int | None) -> InfluenceFunction:
    """Damped by 0.1 × the mean eigenvalue."""
    return InfluenceFunction(EKFAC(columns=columns))


def gauss_newton(case: Case, columns: int | None) -> InfluenceFunction:
    """Damped by what the training was."""
    return InfluenceFunction(GaussNewton(columns=columns), damping=case.damping)


MAKERS: dict[str, Make] = {
    "gradient dot product": dot_product,
    "EK-FAC, 512 columns": partial(ekfac, columns=512),
    "EK-FAC": partial(ekfac, columns=EKFAC().columns),
    **{f"Gauss–Newton, {k} columns": partial(gauss_newton, columns=k) for k in (64, 128, 256, 600, 1024, 2048, 4096)},
    "Gauss–Newton": partial(gauss_newton, columns=None),
}
AVERAGED = ("EK-FAC, 512 columns", "Gauss–Newton, 256 columns", "Gauss–Newton, 1024 columns")
OURS: dict[str, Method] = {
    **{name: partial(scored, make) for name, make in MAKERS.items()},
    **{f"{name}, 6 models": partial(averaged, partial(scored, MAKERS[name])) for name in AVERAGED},
}
# As they run where there are many training samples
STREAMED: dict[str, Method] = {
    name: partial(scored, make, top_k=10)
    for name, make in MAKERS.items()
    if name in ("gradient dot product", "EK-FAC, 512 columns", "EK-FAC", "Gauss–Newton, 1024 columns")
}
