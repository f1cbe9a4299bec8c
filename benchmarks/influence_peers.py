"""Other packages in the benchmark of influence: name → scores `(q, n)`, positive is helpful.

Each is asked as its own guide asks it, in batches of 64. Where a package's default fits this size badly, a second row
has the setting that does better.
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
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.influence_data import BATCH, Case
from benchmarks.influence_methods import Method, averaged
from benchmarks.stubs import load

SEED = 0


def loader(data: TensorDataset) -> DataLoader[Any]:
    return DataLoader(data, BATCH)


# captum


def tracin(case: Case, **options: Any) -> Tensor:
    return _tracin("TracInCP", case, case.checkpoints, case.rates, **options)


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
        batch_size=BATCH,
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
        batch_size=BATCH,
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
            per_device_batch_size=BATCH,
            factor_args=arguments.FactorArguments(strategy=strategy),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            case.query,
            case.train,
            per_device_query_batch_size=BATCH,
            per_device_train_batch_size=BATCH,
            score_args=arguments.ScoreArguments(damping_factor=damping),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]


# pyDVL


def pydvl(name: str, case: Case, **options: Any) -> Tensor:
    package, net = load("pydvl.influence.torch"), load("copy").deepcopy(case.net)
    loss = () if name == "EkfacInfluence" else (F.cross_entropy,)
    fitted = getattr(package, name)(net, *loss, **options).fit(loader(case.train))
    rows = []
    for x, y in loader(case.query):
        rows.append(torch.cat([fitted.influences(x, y, *few).detach() for few in loader(case.train)], dim=1))
    return torch.cat(rows)


def second_order(kind: str) -> Any:
    return getattr(load("pydvl.influence.torch.util").SecondOrderMode, kind)


def pydvl_lissa(case: Case, **options: Any) -> Tensor:
    return pydvl("LissaInfluence", case, regularization=case.damping, **options)


def pydvl_ekfac(case: Case, update_diagonal: bool) -> Tensor:
    return pydvl("EkfacInfluence", case, update_diagonal=update_diagonal, hessian_regularization=case.damping)


def pydvl_cg(case: Case, **options: Any) -> Tensor:
    return pydvl("CgInfluence", case, regularization=case.damping, **options)


def pydvl_direct(case: Case) -> Tensor:
    return pydvl("DirectInfluence", case, regularization=case.damping)


def pydvl_arnoldi(case: Case) -> Tensor:
    return pydvl("ArnoldiInfluence", case, regularization=case.damping, rank=200)


def pydvl_nystroem(case: Case) -> Tensor:
    return pydvl("NystroemSketchInfluence", case, regularization=case.damping, rank=500)


# TRAK


def trak(case: Case, dim: int, ridge: float = 0.0) -> Tensor:
    """Return the scores averaged over the case's networks, each with its own projection."""
    package = load("trak")
    with tempfile.TemporaryDirectory() as folder:
        traker = package.TRAKer(
            case.net,
            "image_classification",
            len(case.train),
            save_dir=folder,
            device="cpu",
            proj_dim=dim,
            use_half_precision=False,
            lambda_reg=ridge,
            logging_level=logging.ERROR,
        )
        weights = [net.state_dict() for net in case.models]
        for model_id, state in enumerate(weights):
            traker.load_checkpoint(state, model_id=model_id)
            for batch in loader(case.train):
                traker.featurize(batch=batch, num_samples=len(batch[1]))
        traker.finalize_features()
        for model_id, state in enumerate(weights):
            traker.start_scoring_checkpoint("queries", state, model_id, num_targets=len(case.query))
            for batch in loader(case.query):
                traker.score(batch=batch, num_samples=len(batch[1]))
        return torch.tensor(traker.finalize_scores("queries")).T


def of_one_model(method: Callable[..., Tensor], case: Case, **options: Any) -> Tensor:
    return method(dataclasses.replace(case, models=[case.net]), **options)


# dattri


def dattri(name: str, case: Case, module: str = "influence_function", **options: Any) -> Tensor:
    net = load("copy").deepcopy(case.net)

    def loss(weights: Mapping[str, Tensor], pair: Any) -> Tensor:
        return F.cross_entropy(functional_call(net, dict(weights), pair[0]), pair[1])

    task = load("dattri.task").AttributionTask(loss_func=loss, model=net, checkpoints=dict(net.state_dict()))
    torch.manual_seed(SEED)
    attributor = getattr(load(f"dattri.algorithm.{module}"), name)(task=task, **options)
    attributor.cache(loader(case.train))
    return attributor.attribute(loader(case.train), loader(case.query)).detach().T


# curvlinops


def curvlinops(operator: Callable[[Case, Any, list[nn.Parameter]], Any], case: Case) -> Tensor:
    """Return scores from the package's inverse of a curvature; per-sample gradients are `torch.func`'s."""
    package, parameters = load("curvlinops"), list(case.net.parameters())
    inverse = operator(case, package, parameters)
    queries = torch.cat(list(_gradients(case.net, case.query)))
    solved = inverse @ queries.T
    return torch.cat([(few @ solved).T for few in _gradients(case.net, case.train)], dim=1)


def curvlinops_ekfac(case: Case, package: Any, parameters: list[nn.Parameter], fisher: str) -> Any:
    matrix = package.EKFACLinearOperator(
        case.net,
        nn.CrossEntropyLoss(),
        parameters,
        list(loader(case.train)),
        check_deterministic=False,
        fisher_type=getattr(package.FisherType, fisher),
        separate_weight_and_bias=False,
    )
    return package.KFACInverseLinearOperator(matrix, damping=case.damping, use_exact_damping=True)


def curvlinops_cg(case: Case, package: Any, parameters: list[nn.Parameter], steps: int) -> Any:
    data = list(loader(case.train))
    matrix = package.GGNLinearOperator(
        case.net, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False
    )
    identity = load("curvlinops.examples").IdentityLinearOperator(
        [p.shape for p in parameters], parameters[0].device, parameters[0].dtype
    )
    return package.CGInverseLinearOperator(
        matrix + case.damping * identity, max_iter=steps, max_tridiag_iter=0, eps=0, tolerance=1e-4
    )


def _gradients(net: nn.Module, data: TensorDataset) -> Iterator[Tensor]:
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, weights, x[None]), y[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    for x, y in loader(data):
        yield torch.cat([part.flatten(1) for part in each(weights, x, y).values()], dim=1)


PEERS: dict[str, Method] = {
    "captum gradient dot product": gradient_dot_product,
    "captum gradient dot product, last layer": gradient_dot_product_fast,
    "captum TracInCP, 8 checkpoints": partial(tracin, sample_wise_grads_per_batch=True),
    "captum TracInCPFast, 8 checkpoints": tracin_fast,
    "captum Arnoldi": arnoldi,
    "kronfluence EK-FAC": partial(kronfluence, damping=1e-8),
    "kronfluence EK-FAC, damping None": partial(kronfluence, damping=None),
    "kronfluence K-FAC, damping None": partial(kronfluence, damping=None, strategy="kfac"),
    "pyDVL EK-FAC": partial(pydvl_ekfac, update_diagonal=True),
    "pyDVL CG, Hessian": partial(pydvl_cg, solve_simultaneously=True, maxiter=100, warn_on_max_iteration=False),
    "pyDVL direct, Hessian": pydvl_direct,
    "pyDVL Arnoldi, rank 200": pydvl_arnoldi,
    "pyDVL Nyström, rank 500": pydvl_nystroem,
    "pyDVL LiSSA": pydvl_lissa,
    "traker TRAK, 512": partial(of_one_model, trak, dim=512),
    "traker TRAK, 512, 6 models": partial(trak, dim=512),
    "dattri EK-FAC": lambda case: dattri("IFAttributorEKFAC", case, damping=case.damping),
    "dattri DataInf": lambda case: dattri("IFAttributorDataInf", case, regularization=case.damping),
    "dattri Arnoldi": lambda case: dattri("IFAttributorArnoldi", case, regularization=case.damping),
    "dattri CG": lambda case: dattri("IFAttributorCG", case, regularization=case.damping),
    "dattri explicit": lambda case: dattri("IFAttributorExplicit", case, regularization=case.damping),
    "dattri LiSSA": lambda case: dattri("IFAttributorLiSSA", case, damping=case.damping),
    "curvlinops EK-FAC, one sampled label": partial(curvlinops, partial(curvlinops_ekfac, fisher="MC")),
    "curvlinops EK-FAC, all classes": partial(curvlinops, partial(curvlinops_ekfac, fisher="TYPE2")),
    "curvlinops Gauss–Newton, CG": partial(curvlinops, partial(curvlinops_cg, steps=50)),
}
