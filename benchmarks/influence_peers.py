"""Other packages in the benchmark of influence: name → scores `(q, n)`, positive is helpful.

Each is asked as its own guide asks it, in batches of 64 and, where that makes a difference, of 512. Where a package's
default fits this size badly, another row has a setting that does better; TRAK's ridge is the best of a few, here as
in ours.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader

from benchmarks.influence_data import Case
from benchmarks.influence_methods import Method
from benchmarks.stubs import load

SEED = 0
MODULES = {
    "captum": "captum.influence",
    "kronfluence": "kronfluence.analyzer",
    "pyDVL": "pydvl.influence.torch",
    "traker": "trak",
    "dattri": "dattri.algorithm.influence_function",
    "curvlinops": "curvlinops",
}


def train(case: Case) -> DataLoader[Any]:
    return DataLoader(case.train, case.batch)


def query(case: Case) -> DataLoader[Any]:
    return DataLoader(case.query, case.batch)


# captum


def tracin(case: Case) -> Tensor:
    return _tracin("TracInCP", case, case.checkpoints, case.rates, sample_wise_grads_per_batch=True)


def tracin_fast(case: Case) -> Tensor:
    return _tracin("TracInCPFast", case, case.checkpoints, case.rates, final_fc_layer=case.net.fc2)


def gradient_dot_product_fast(case: Case) -> Tensor:
    return _tracin("TracInCPFast", case, [case.net.state_dict()], [1.0], final_fc_layer=case.net.fc2)


def gradient_dot_product(case: Case) -> Tensor:
    return _tracin("TracInCP", case, [case.net.state_dict()], [1.0], sample_wise_grads_per_batch=True)


def _tracin(name: str, case: Case, checkpoints: Any, rates: Any, **options: Any) -> Tensor:
    at = dict(zip(map(str, range(len(rates))), zip(checkpoints, rates, strict=True), strict=True))

    def restore(net: nn.Module, which: str) -> float:
        weights, rate = at[which]
        net.load_state_dict(weights)
        return rate

    kept = {name: tensor.clone() for name, tensor in case.net.state_dict().items()}
    influence = getattr(load("captum.influence"), name)(
        case.net,
        train_dataset=case.train,
        checkpoints=list(at),
        checkpoints_load_func=restore,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=case.batch,
        **options,
    )
    scores = influence.influence(case.query.tensors)
    case.net.load_state_dict(kept)
    return scores


def arnoldi(case: Case, **options: Any) -> Tensor:
    influence = load("captum.influence._core.arnoldi_influence_function").ArnoldiInfluenceFunction(
        case.net,
        case.train,
        checkpoint="",
        checkpoints_load_func=lambda net, which: 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=case.batch,
        sample_wise_grads_per_batch=True,
        seed=SEED,
        **options,
    )
    return influence.influence(case.query.tensors)


# kronfluence


def kronfluence(case: Case, damping: float | None, strategy: str = "ekfac") -> Tensor:
    arguments, task_of = load("kronfluence.arguments"), load("kronfluence.task").Task

    class Task(task_of):  # type: ignore[misc, valid-type]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0])
            drawn = torch.multinomial(logits.detach().softmax(1), 1).flatten() if sample else batch[1]
            return F.cross_entropy(logits, drawn, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    torch.manual_seed(SEED)
    net, task = load("copy").deepcopy(case.net), Task()
    net = load("kronfluence.analyzer").prepare_model(net, task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = load("kronfluence.analyzer").Analyzer(
            "digits", net, task, cpu=True, disable_tqdm=True, output_dir=folder, log_level=logging.ERROR
        )
        analyzer.fit_all_factors(
            "factors",
            case.train,
            per_device_batch_size=case.batch,
            factor_args=arguments.FactorArguments(strategy=strategy),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            case.query,
            case.train,
            per_device_query_batch_size=case.batch,
            per_device_train_batch_size=case.batch,
            score_args=arguments.ScoreArguments(damping_factor=damping),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]


# pyDVL


def pydvl(name: str, case: Case, **options: Any) -> Tensor:
    package, net = load("pydvl.influence.torch"), load("copy").deepcopy(case.net)
    torch.manual_seed(SEED)
    method = getattr(package, name)(net, F.cross_entropy, regularization=case.damping, **options)
    return _pydvl(method, case)


def pydvl_ekfac(case: Case, update_diagonal: bool) -> Tensor:
    package, net = load("pydvl.influence.torch"), load("copy").deepcopy(case.net)
    torch.manual_seed(SEED)
    return _pydvl(package.EkfacInfluence(net, update_diagonal, hessian_regularization=case.share), case)


def _pydvl(method: Any, case: Case) -> Tensor:
    rows, fitted = [], method.fit(train(case))
    for x, y in query(case):
        solved = fitted.influence_factors(x, y).detach()
        parts = [fitted.influences_from_factors(solved, *few).detach() for few in train(case)]
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


# TRAK


def trak(case: Case, dim: int, ridge: float = 0.0) -> Tensor:
    """Return the scores averaged over the case's networks, each with its own projection."""
    package, net = load("trak"), load("copy").deepcopy(case.net)
    with tempfile.TemporaryDirectory() as folder:
        traker = package.TRAKer(
            net,
            "image_classification",
            len(case.train),
            save_dir=folder,
            device="cpu",
            proj_dim=dim,
            use_half_precision=False,
            lambda_reg=ridge,
            logging_level=logging.ERROR,
        )
        weights = [one.state_dict() for one in case.models]
        for model_id, state in enumerate(weights):
            traker.load_checkpoint(state, model_id=model_id)
            for batch in train(case):
                traker.featurize(batch=batch, num_samples=len(batch[1]))
        traker.finalize_features()
        for model_id, state in enumerate(weights):
            traker.start_scoring_checkpoint("queries", state, model_id, num_targets=len(case.query))
            for batch in query(case):
                traker.score(batch=batch, num_samples=len(batch[1]))
        return torch.tensor(traker.finalize_scores("queries")).T


def larger(method: Method, case: Case) -> Tensor:
    return method(dataclasses.replace(case, batch=512))


def of_one(method: Callable[..., Tensor], case: Case, **options: Any) -> Tensor:
    return method(dataclasses.replace(case, models=[case.net]), **options)


# dattri


def dattri(name: str, case: Case, **options: Any) -> Tensor:
    return _dattri(name, case, regularization=case.damping, **options)


def dattri_ekfac(case: Case) -> Tensor:
    return _dattri("IFAttributorEKFAC", case, damping=case.share)


def dattri_lissa(case: Case) -> Tensor:
    """Its damping is of the curvature over the scale."""
    options = {"batch_size": case.batch, "scaling": 50.0, "recursion_depth": 1000, "damping": case.damping / 50}
    return _dattri("IFAttributorLiSSA", dataclasses.replace(case, batch=len(case.train)), **options)


def _dattri(name: str, case: Case, **options: Any) -> Tensor:
    """Return scores; as it solves again for each batch of training samples, these come in one."""
    net = load("copy").deepcopy(case.net)

    def loss(weights: Mapping[str, Tensor], pair: Any) -> Tensor:
        return F.cross_entropy(functional_call(net, dict(weights), pair[0]), pair[1].long())

    task = load("dattri.task").AttributionTask(loss_func=loss, model=net, checkpoints=dict(net.state_dict()))
    torch.manual_seed(SEED)
    attributor = getattr(load("dattri.algorithm.influence_function"), name)(task=task, **options)
    attributor.cache(train(case))
    return attributor.attribute(DataLoader(case.train, len(case.train)), query(case)).detach().T


# curvlinops


def curvlinops(operator: Callable[[Case, Any, list[nn.Parameter]], Any], case: Case) -> Tensor:
    """Return scores from the package's inverse of a curvature; per-sample gradients are `torch.func`'s."""
    package, parameters = load("curvlinops"), list(case.net.parameters())
    inverse = operator(case, package, parameters)
    queries = torch.cat(list(_gradients(case.net, query(case))))
    solved = inverse @ queries.T
    return torch.cat([(few @ solved).T for few in _gradients(case.net, train(case))], dim=1)


def curvlinops_ekfac(case: Case, package: Any, parameters: list[nn.Parameter], fisher: str) -> Any:
    matrix = package.EKFACLinearOperator(
        case.net,
        nn.CrossEntropyLoss(),
        parameters,
        list(train(case)),
        check_deterministic=False,
        fisher_type=getattr(package.FisherType, fisher),
        separate_weight_and_bias=False,
    )
    return package.KFACInverseLinearOperator(matrix, damping=case.share, use_exact_damping=True)


def curvlinops_cg(case: Case, package: Any, parameters: list[nn.Parameter], steps: int) -> Any:
    data = list(train(case))
    matrix = package.GGNLinearOperator(case.net, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
    identity = load("curvlinops.examples").IdentityLinearOperator(
        [p.shape for p in parameters], parameters[0].device, parameters[0].dtype
    )
    return package.CGInverseLinearOperator(
        matrix + case.damping * identity, max_iter=steps, max_tridiag_iter=0, eps=0, tolerance=1e-4
    )


def _gradients(net: nn.Module, data: DataLoader[Any]) -> Iterator[Tensor]:
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, weights, x[None]), y[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    for x, y in data:
        yield torch.cat([part.flatten(1) for part in each(weights, x, y).values()], dim=1)


EACH: dict[str, Method] = {
    "captum gradient dot product": gradient_dot_product,
    "captum gradient dot product, last layer": gradient_dot_product_fast,
    "captum TracInCP, 8 checkpoints": tracin,
    "captum TracInCPFast, 8 checkpoints": tracin_fast,
    "captum Arnoldi, 50 of 200": arnoldi,
    "captum Arnoldi, 200 of 400": partial(arnoldi, projection_dim=200, arnoldi_dim=400),
    "kronfluence EK-FAC": partial(kronfluence, damping=1e-8),
    "kronfluence EK-FAC, damping None": partial(kronfluence, damping=None),
    "kronfluence K-FAC, damping None": partial(kronfluence, damping=None, strategy="kfac"),
    "pyDVL K-FAC": partial(pydvl_ekfac, update_diagonal=False),
    "pyDVL EK-FAC": partial(pydvl_ekfac, update_diagonal=True),
    "pyDVL LiSSA": partial(pydvl, "LissaInfluence"),
    "pyDVL CG, 20 steps": partial(pydvl, "CgInfluence", maxiter=20, warn_on_max_iteration=False),
    "pyDVL direct": partial(pydvl, "DirectInfluence"),
    "pyDVL Arnoldi, rank 200": partial(pydvl, "ArnoldiInfluence", rank=200),
    "pyDVL Nyström, rank 500": partial(pydvl, "NystroemSketchInfluence", rank=500),
    "traker TRAK, 512": partial(of_one, trak, dim=512),
    "traker TRAK, 512, ridge 30": partial(of_one, trak, dim=512, ridge=30),
    "traker TRAK, 2048, ridge 100": partial(of_one, trak, dim=2048, ridge=100),
    "traker TRAK, 512, ridge 30, 6 models": partial(trak, dim=512, ridge=30),
    "dattri EK-FAC": partial(dattri_ekfac),
    "dattri DataInf": partial(dattri, "IFAttributorDataInf"),
    "dattri Arnoldi": partial(dattri, "IFAttributorArnoldi"),
    "dattri CG": partial(dattri, "IFAttributorCG"),
    "dattri explicit": partial(dattri, "IFAttributorExplicit"),
    "dattri LiSSA": dattri_lissa,
    "curvlinops EK-FAC, one sampled label": partial(curvlinops, partial(curvlinops_ekfac, fisher="MC")),
    "curvlinops EK-FAC, all classes": partial(curvlinops, partial(curvlinops_ekfac, fisher="TYPE2")),
    **{
        f"curvlinops Gauss–Newton, CG, {steps} steps": partial(curvlinops, partial(curvlinops_cg, steps=steps))
        for steps in (5, 10, 20, 50)
    },
}
LARGER = (
    "captum gradient dot product",
    "captum gradient dot product, last layer",
    "captum TracInCPFast, 8 checkpoints",
    "traker TRAK, 512, ridge 30",
    "pyDVL K-FAC",
    "kronfluence EK-FAC, damping None",
    "curvlinops EK-FAC, one sampled label",
    "curvlinops EK-FAC, all classes",
    "curvlinops Gauss–Newton, CG, 10 steps",
)
PEERS: dict[str, Method] = EACH | {f"{name}, batches of 512": partial(larger, EACH[name]) for name in LARGER}
