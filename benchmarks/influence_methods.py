"""Our estimators in the benchmark of influence: name → scores `(q, n)`, positive is helpful.

Samples go through the network up to 1,024 at once where their batches may have any size, as the package does by itself.
Some rows show the same through a loader that asks for single samples, and through one whose collate is the user's own
and whose batches of 64 are therefore kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from benchmarks.influence_data import BATCH, Case
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


class Items(Dataset[Any]):
    """Samples that are made one by one."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def own_collate(items: list[Any]) -> Any:
    """Collate as a user's own function does, of which the package knows nothing."""
    return default_collate(items)


def through_loader(make: Make, collate: Callable[[list[Any]], Any], case: Case) -> Tensor:
    """Read the samples one by one, by a loader with batches of 64."""
    train, query = (DataLoader(Items(data), BATCH, collate_fn=collate) for data in (case.train, case.query))
    return make(case)(case.net, train, query).scores


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
    "gradient dot product, last layer": lambda case: InfluenceFunction(IdentityCurvature(), 1.0, layers=["fc2"]),
    "TracIn, 8 checkpoints": tracin,
    "TRAK, 512": trak,
    "TRAK, 512, damped": partial(trak, damping=0.3),
    "K-FAC": partial(shared, KFAC()),
    "EK-FAC, 512 columns": partial(shared, EKFAC(columns=512)),
    "EK-FAC": partial(shared, EKFAC()),
    "EK-FAC, all classes": partial(shared, EKFAC(columns=None)),
    "default": default,
    **{
        f"Gauss–Newton, {k} columns": partial(trained, GaussNewton(columns=k))
        for k in (64, 128, 192, 256, 400, 600, 1024, 2048)
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
    **{
        f"{name}, through a loader{told}": partial(through_loader, MAKERS[name], collate)
        for name in ("gradient dot product", "EK-FAC, 512 columns", "Gauss–Newton, 128 columns", "default")
        for told, collate in (("", default_collate), (", collate of its own", own_collate))
    },
    "TRAK, 512, damped, 6 models": partial(
        scored, lambda case: TRAK([net.state_dict() for net in case.models], 512, 0.3)
    ),
}
CORRECTED: Mapping[str, Method] = {"Hessian, corrected for leverage": corrected}
# As they run where there are many training samples
STREAMED: Mapping[str, Method] = {
    name: partial(scored, MAKERS[name], top_k=10)
    for name in (
        "gradient dot product",
        "TracIn, 8 checkpoints",
        "EK-FAC, 512 columns",
        "EK-FAC",
        "Gauss–Newton, 1024 columns",
        "TRAK, 512",
    )
}
