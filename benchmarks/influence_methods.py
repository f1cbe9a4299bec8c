"""Our estimators in the benchmark of influence: name → scores `(q, n)`, positive is helpful."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.influence_data import Case
from lightning_interp.influence import EKFAC, GaussNewton, InfluenceFunction

Method = Callable[[Case], Tensor]


def ekfac(case: Case) -> Tensor:
    return InfluenceFunction(EKFAC())(case.net, case.train, case.query).scores


def gauss_newton(case: Case) -> Tensor:
    estimator = InfluenceFunction(GaussNewton(), damping=case.damping)
    return estimator(case.net, case.train, case.query).scores


def averaged(method: Method, case: Case) -> Tensor:
    """Return the mean of the scores of networks trained from several seeds."""
    return torch.stack([method(dataclasses.replace(case, net=net)) for net in case.models]).mean(0)


OURS: dict[str, Method] = {
    "EK-FAC": ekfac,
    "EK-FAC, 6 models": partial(averaged, ekfac),
    "Gauss–Newton": gauss_newton,
}
