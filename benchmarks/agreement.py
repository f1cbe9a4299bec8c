"""Do other packages give the same numbers? `python -m benchmarks.agreement`.

Every function is called as its own documentation says, in one process, on the same float32 tensors. A cell holds its
value, and in brackets the difference from the reference where that exceeds 1e-4. The reference is our value for the
features in float64, before the offset of "+10 sd" to "+100 sd" and the factor of "× 0.01"; it is printed first, our
own float32 values below it, and for the golden pair it must be what was confirmed by other means. Where it is NaN,
nothing is defined, and NaN or an error is right. "–" means not tried: not defined, or too slow.

A second table is for packages that hook modules and sum over batches: differences from the value of the same samples at
once, with the standard deviation over orders of the samples. Peers come from `pip install --no-deps`; one that is
missing is said to be. With all of them it takes three minutes.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp.network.undisturbed import capture
from lightning_interp.similarity import CCA, CKA, PWCCA, SVCCA, Procrustes, RBFKernel, StreamingCKA

Batches = DataLoader[tuple[Tensor, ...]]
OfFeatures = Callable[[Tensor, Tensor], float]
OfLayers = Callable[[nn.Module, Batches], float]

SAME, CLASSES, ORDERS = 1e-4, 8, 8
LINEAR, DEBIASED, HALF, MEDIAN = "linear CKA", "debiased CKA", "RBF CKA, σ = ½ median", "RBF CKA, σ = median"
MEAN, SQUARED, SV, PW, COSINE = "CCA, mean ρ", "CCA, mean ρ²", "SVCCA 0.99, mean ρ", "PWCCA", "Procrustes cosine"
OURS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    LINEAR: CKA(),
    DEBIASED: CKA(debiased=True),
    HALF: CKA(RBFKernel(0.5)),
    MEDIAN: CKA(RBFKernel(1.0)),
    MEAN: CCA(),
    SQUARED: CCA("mean_squared"),
    SV: SVCCA(),
    PW: PWCCA(),
    COSINE: Procrustes(),
}
CONFIRMED = {LINEAR: 0.657696, DEBIASED: 0.632393, HALF: 0.761219, MEAN: 0.990431, SQUARED: 0.981117, SV: 0.994080}
CONFIRMED |= {PW: 0.994771, COSINE: 0.762808}
CANONICAL = (MEAN, SQUARED, SV, PW)
WIDE = "wide and unrelated"
UNUSED = ("h5py", "open_clip", "seaborn", "skimage", "torchtyping", "uutils")


@dataclass(frozen=True)
class Given:
    """Two sets of features: in float64 for the reference; scaled, shifted and in float32 for everyone.

    Args:
        name: column of the table.
        x: `(n, d1)`.
        y: `(n, d2)`.
        offset: added to every number, in standard deviations.
        factor: of every number.
    """

    name: str
    x: Tensor
    y: Tensor
    offset: float = 0.0
    factor: float = 1.0

    def float32(self) -> tuple[Tensor, Tensor]:
        x, y = ((self.factor * (z + self.offset * z.std())).float() for z in (self.x, self.y))
        return x, y


@dataclass(frozen=True)
class Peer:
    """Another package's function.

    Args:
        measure: ours with which it is to be compared.
        package: its name on the package index.
        function: what is called, for people.
        call: gives the value, on our scale (cos θ from a distance 1 − cos θ).
        other: what it computes where that is another quantity on purpose.
        most: number of samples above which it is too slow here.
    """

    measure: str
    package: str
    function: str
    call: OfFeatures
    other: str = ""
    most: int = 10**9


# Importing peers


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for missing modules that a peer imports and that no function called here needs."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        unused = name.partition(".")[0] in UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if unused else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return MagicMock(__path__=[])

    def exec_module(self, module: ModuleType) -> None:
        """Leave it as it is."""


def load(name: str) -> Any:
    """Import a peer's module, the real thing where it is installed."""
    sys.meta_path.append(stubs := Stubs())
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(stubs)


def load_part(name: str) -> Any:
    """Import a module without running its package's `__init__`, which fails or needs far more."""
    package = name.partition(".")[0]
    if package not in sys.modules and (spec := importlib.util.find_spec(package)):
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations or [])
    return load(name)


# Inputs


def golden() -> tuple[Tensor, Tensor]:
    r = np.random.RandomState(0)
    x, a = r.randn(200, 30), r.randn(30, 20)
    return torch.from_numpy(x), torch.from_numpy(x @ a + 0.5 * r.randn(200, 20))


def network(n: int = 1024) -> tuple[Tensor, Tensor]:
    """Return what both convolutions of an untrained network give for noisy images, class after class."""
    torch.manual_seed(0)
    kinds = F.interpolate(torch.randn(CLASSES, 1, 4, 4), (12, 12), mode="bilinear")
    images = kinds.repeat_interleave(n // CLASSES, 0) + 0.5 * torch.randn(n, 1, 12, 12)
    first, second = nn.Conv2d(1, 4, 3, 2, 1).double(), nn.Conv2d(4, 8, 3, 2, 1).double()
    with torch.no_grad():
        x = first(images.double())
        return x.flatten(1), second(F.relu(x)).flatten(1)


def inputs() -> list[Given]:
    x, y = golden()
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = noise(64, 128)
    return [
        Given("golden", x, y),
        *(Given(f"+{offset} sd", x, y, offset) for offset in (10, 30, 100)),
        Given("× 0.01", x, y, factor=0.01),
        Given("X and X", x, x.clone()),
        Given("X and shuffled Y", x, y[torch.randperm(200, generator=generator)]),
        Given("X and a constant", x, torch.full_like(y, 3.7)),
        Given("network", *network()),
        Given("d > n", wide, wide @ noise(128, 96) + 5 * noise(64, 96)),
        Given(WIDE, noise(512, 2048), noise(512, 2048)),
    ]


class Rows(nn.Module):
    """A layer that gives the asked rows of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, index: Tensor) -> Tensor:
        return self.table[index]


class Layers(nn.Module):
    """A network whose layers `x` and `y` give known features; a ReLU in place may follow `x`."""

    def __init__(self, x: Tensor, y: Tensor, in_place: bool = False) -> None:
        super().__init__()
        self.x, self.y, self.in_place = Rows(x), Rows(y), in_place

    def forward(self, index: Tensor) -> Tensor:
        x: Tensor = self.x(index)
        if self.in_place:
            F.relu(x, inplace=True)
        y: Tensor = self.y(index)
        return y


def batches(order: Tensor, size: int) -> Batches:
    return DataLoader(TensorDataset(order, order), batch_size=size)


def at_once(peer: OfLayers) -> OfFeatures:
    """Give a peer that hooks modules all samples in one batch."""
    return lambda x, y: peer(Layers(x, y), batches(torch.arange(len(x)), len(x)))


# Peers that hook modules


def pytorch_cka(net: nn.Module, loader: Batches) -> float:
    options = {"layers": ["x"], "model2_layers": ["y"], "device": "cpu", "progress": False}
    return float(load("cka").compute_cka(net, net, loader, **options)[0])


def cka_pytorch(net: nn.Module, loader: Batches) -> float:
    calculator = load("cka_pytorch").CKACalculator(net, net, ["x"], ["y"], verbose=False)
    return float(calculator.calculate_cka_matrix(loader, num_epochs=1))


def torch_cka(net: nn.Module, loader: Batches) -> float:
    cka = load("torch_cka").CKA(net, net, "a", "b", ["x"], ["y"])
    with torch.no_grad():
        cka.compare(loader, loader)
    return float(cka.export()["CKA"])


def ckatorch_class(net: nn.Module, loader: Batches) -> float:
    order = torch.cat([index for index, _ in loader])
    alone = DataLoader(TensorDataset(order), batch_size=loader.batch_size)
    return float(load("ckatorch").CKA(net, net, ["x"], ["y"])(alone, epochs=1))


def simtorch(net: nn.Module, loader: Batches, **options: Any) -> float:
    models = [load("simtorch.model").SimilarityModel(net, name, [name]) for name in ("x", "y")]
    return float(load("simtorch.similarity").CKA(*models, **options).compute(loader).item())


def simtorch_unbiased(net: nn.Module, loader: Batches) -> float:
    return simtorch(net, loader, unbiased=True)


def simtorch_procrustes(net: nn.Module, loader: Batches) -> float:
    models = [load("simtorch.model").SimilarityModel(net, name, [name]) for name in ("x", "y")]
    return 1 - float(load("simtorch.similarity.procrustes").Procrustes(*models).compute(loader).item())


def streaming(net: nn.Module, loader: Batches) -> float:
    width_x, width_y = (net.get_parameter(f"{layer}.table").shape[1] for layer in ("x", "y"))
    metric = StreamingCKA(width_x, width_y)
    for index, _ in loader:
        with capture(net, ["x", "y"], lambda _, __, output: output.clone()) as outputs:
            net(index)
        metric.update(outputs["x"][0], outputs["y"][0])
    return float(metric.compute())


# Peers that take features


def in_numpy(function: Callable[[Any, Any], Any]) -> OfFeatures:
    return lambda x, y: float(function(x.numpy(), y.numpy()))


def pytorch_cka_features(x: Tensor, y: Tensor) -> float:
    return float(load("cka").cka_from_features(x, y))


def ckatorch(**options: Any) -> OfFeatures:
    return lambda x, y: float(load("ckatorch.core").cka_base(x, y, **options))


def thingsvision(backend: str, **options: Any) -> OfFeatures:
    def cka(x: Any, y: Any) -> Any:
        get_cka = load_part("thingsvision.core.cka").get_cka
        return get_cka(backend, len(x), device="cpu", **options).compare(x, y)

    return in_numpy(cka)


def repsim(name: str, *options: str) -> OfFeatures:
    return in_numpy(lambda x, y: getattr(load("repsim"), name)([x, y], *options)[0, 1])


def rsatoolbox(method: str) -> OfFeatures:
    def compare(x: Any, y: Any) -> Any:
        rsa = load("rsatoolbox")
        squared = [rsa.rdm.calc_rdm(rsa.data.Dataset(z), method="euclidean") for z in (x, y)]
        return rsa.rdm.compare(*squared, method=method).item()

    return in_numpy(compare)


def anatome(name: str, **options: Any) -> OfFeatures:
    return lambda x, y: 1 - float(getattr(load("anatome.similarity"), name)(x, y, **options))


def deep_reps(module: str, name: str) -> OfFeatures:
    return lambda x, y: float(getattr(load_part(f"deep_reps.{module}"), name)(x, y))


def cka_analyzer(x: Any, y: Any) -> Any:
    return load("cka_analyzer.compute").linear_cka(x, y)


def canonical(module: str) -> OfFeatures:
    """Fit a `CCA` of scikit-learn's form with all components; the mean correlation of its scores."""

    def mean_correlation(x: Any, y: Any) -> Any:
        cca = load(module).CCA(min(*x.shape, *y.shape))
        scores = cca.fit_transform(x, y) if module.startswith("sklearn") else cca.fit_transform([x, y])
        return np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*(z.T for z in scores), strict=True)])

    return in_numpy(mean_correlation)


def scipy_disparity(x: Any, y: Any) -> float:
    """Give it two arrays of one shape; the disparity is 1 − cos² θ."""
    wider = max(x.shape[1], y.shape[1])
    x, y = (np.pad(z, ((0, 0), (0, wider - z.shape[1]))) for z in (x, y))
    return math.sqrt(1 - load("scipy.spatial").procrustes(x, y)[2])


def torchmetrics_disparity(x: Tensor, y: Tensor) -> float:
    wider = max(x.shape[1], y.shape[1])
    x, y = (F.pad(z, (0, wider - z.shape[1]))[None] for z in (x, y))
    return math.sqrt(1 - float(load("torchmetrics.functional.shape").procrustes_disparity(x, y)))


def qc_procrustes(x: Any, y: Any) -> Any:
    """Take cos θ from the smallest squared distance of unit norms, 2 − 2 cos θ."""
    return 1 - load("procrustes").orthogonal(x, y, translate=True, scale=True).error / 2


AVERAGE = "the mean of weights from X and from Y"
PWCCA_OF_ANATOME = "pwcca_distance_choose_best_layer_matrix"
PEERS = [
    Peer(LINEAR, "ckatorch", "cka_base", ckatorch()),
    Peer(LINEAR, "simtorch", "CKA", at_once(simtorch)),
    Peer(LINEAR, "thingsvision", "get_cka, numpy", thingsvision("numpy")),
    Peer(LINEAR, "thingsvision", "get_cka, torch", thingsvision("torch")),
    Peer(LINEAR, "cka-analyzer", "linear_cka", in_numpy(cka_analyzer)),
    Peer(LINEAR, "repsim", "cka, linear, gretton", repsim("cka", "linear", "gretton")),
    Peer(LINEAR, "rsatoolbox", "compare, cosine_cov", rsatoolbox("cosine_cov")),
    Peer(LINEAR, "ultimate-anatome", "linear_cka_distance", anatome("linear_cka_distance", reduce_bias=False)),
    Peer(LINEAR, "deep-reps", "centered_…", deep_reps("rsm_measures", "centered_kernel_alignment"), most=200),
    Peer(DEBIASED, "pytorch-cka", "cka_from_features", pytorch_cka_features),
    Peer(DEBIASED, "pytorch-cka", "compute_cka", at_once(pytorch_cka)),
    Peer(DEBIASED, "cka-pytorch", "CKACalculator", at_once(cka_pytorch)),
    Peer(DEBIASED, "torch_cka", "CKA", at_once(torch_cka)),
    Peer(DEBIASED, "ckatorch", "CKA", at_once(ckatorch_class)),
    Peer(DEBIASED, "ckatorch", "cka_base, unbiased", ckatorch(unbiased=True)),
    Peer(DEBIASED, "ckatorch", "cka_base, unbiased, hsic", ckatorch(unbiased=True, method="hsic")),
    Peer(DEBIASED, "simtorch", "CKA, unbiased", at_once(simtorch_unbiased)),
    Peer(DEBIASED, "thingsvision", "get_cka, numpy, unbiased", thingsvision("numpy", unbiased=True)),
    Peer(DEBIASED, "thingsvision", "get_cka, torch, unbiased", thingsvision("torch", unbiased=True)),
    Peer(DEBIASED, "ultimate-anatome", "…, reduce_bias", anatome("linear_cka_distance", reduce_bias=True)),
    Peer(DEBIASED, "repsim", "cka, linear, song", repsim("cka", "linear", "song")),
    Peer(DEBIASED, "repsim", "cka, linear, lange", repsim("cka", "linear", "lange"), "HSIC of Lange et al."),
    Peer(DEBIASED, "rsatoolbox", "compare, corr_cov", rsatoolbox("corr_cov"), "whitened correlation of RDMs"),
    Peer(HALF, "ckatorch", "cka_base, rbf, 0.5", ckatorch(kernel="rbf", threshold=0.5)),
    Peer(MEDIAN, "ckatorch", "cka_base, rbf", ckatorch(kernel="rbf")),
    Peer(MEDIAN, "thingsvision", "get_cka, numpy, rbf", thingsvision("numpy", kernel="rbf", sigma=None)),
    Peer(MEDIAN, "thingsvision", "get_cka, torch, rbf", thingsvision("torch", kernel="rbf", sigma=None)),
    Peer(MEDIAN, "repsim", "cka, rbf, gretton", repsim("cka", "rbf", "gretton")),
    Peer(MEAN, "repsim", "cca, pillai", repsim("cca", "pillai")),
    Peer(MEAN, "scikit-learn", "CCA", canonical("sklearn.cross_decomposition"), most=200),
    Peer(MEAN, "cca-zoo", "CCA", canonical("cca_zoo.linear")),
    Peer(MEAN, "deep-reps", "compute_standard_cca", deep_reps("cca_measures", "compute_standard_cca")),
    Peer(SQUARED, "repsim", "cca, yanai", repsim("cca", "yanai")),
    Peer(SV, "repsim", "svcca, pillai", repsim("svcca", "pillai")),
    Peer(SV, "ultimate-anatome", "svcca_distance", anatome("svcca_distance", accept_rate=0.99, backend="svd")),
    Peer(SV, "deep-reps", "compute_standard_svcca", deep_reps("cca_measures", "compute_standard_svcca")),
    Peer(PW, "repsim", "pwcca", repsim("pwcca"), AVERAGE),
    Peer(PW, "ultimate-anatome", "pwcca_distance_…", anatome(PWCCA_OF_ANATOME, backend="svd")),
    Peer(COSINE, "simtorch", "Procrustes", at_once(simtorch_procrustes)),
    Peer(COSINE, "ultimate-anatome", "orthogonal_…", anatome("orthogonal_procrustes_distance")),
    Peer(COSINE, "rsatoolbox", "compare, bures", rsatoolbox("bures")),
    Peer(COSINE, "qc-procrustes", "orthogonal", in_numpy(qc_procrustes)),
    Peer(COSINE, "SciPy", "procrustes", in_numpy(scipy_disparity)),
    Peer(COSINE, "torchmetrics", "procrustes_disparity", torchmetrics_disparity),
]
IN_BATCHES: list[tuple[str, str, str, OfLayers]] = [
    (LINEAR, "ours", "StreamingCKA", streaming),
    (DEBIASED, "pytorch-cka", "compute_cka", pytorch_cka),
    (DEBIASED, "cka-pytorch", "CKACalculator", cka_pytorch),
    (DEBIASED, "torch_cka", "CKA", torch_cka),
    (DEBIASED, "ckatorch", "CKA", ckatorch_class),
    (LINEAR, "simtorch", "CKA", simtorch),
    (COSINE, "simtorch", "Procrustes", simtorch_procrustes),
]


# Tables


def value(call: Callable[[], float]) -> float | str:
    """Return what a peer gives, or the name of what it raises."""
    try:
        with quiet():
            return float(call())
    except Exception as error:
        return type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    out = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        warnings.simplefilter("ignore")
        yield


def cell(value: float | str, reference: float) -> str:
    if isinstance(value, str):
        return value
    difference = value - reference
    return f"{value:z.6f}" + (f" ({difference:+.2g})" if abs(difference) > SAME else "")


def verdict(other: str, values: Mapping[str, float | str], references: Mapping[str, float]) -> str:
    """Say in words what a row shows."""
    if all(isinstance(each, str) for each in values.values()):
        return f"no value: {next(iter(values.values()))}"
    if other:
        return f"another quantity: {other}"
    numbers = {name: each for name, each in values.items() if isinstance(each, float) and not math.isnan(each)}
    defined = [name for name in values if not math.isnan(references[name])]
    differences = {name: abs(numbers[name] - references[name]) for name in defined if name in numbers}
    wrong = {name: difference for name, difference in differences.items() if difference > SAME}
    findings = (
        (f"wrong by up to {max(wrong.values(), default=0):.2g}", list(wrong)),
        ("no value", [name for name in defined if name not in numbers]),
        ("a number where nothing is defined", [name for name in numbers if name not in defined]),
    )
    summary = "; ".join(f"{what} ({listed(names, defined)})" for what, names in findings if names)
    return f"same quantity: {summary or 'right'}"


def listed(names: Sequence[str], among: Sequence[str]) -> str:
    """Name columns, or rather the others where those are fewer."""
    others = [name for name in among if name not in names]
    if set(names) - set(among) or len(others) >= len(names):
        return ", ".join(names)
    return f"all but {', '.join(others)}" if others else "everywhere"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def missing(package: str) -> bool:
    return package != "ours" and version(package) == "not installed"


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def of_features(columns: Sequence[Given]) -> None:
    """Print what functions make of whole sets of features."""
    row("measure", "whose", *(given.name for given in columns), "verdict")
    row(*["---"] * (len(columns) + 3))
    for measure, function in OURS.items():
        tried = [given for given in columns if measure not in CANONICAL or given.name != WIDE]
        references = {given.name: float(function(given.x, given.y)) for given in tried}
        told = (cell(references[given.name], 0).partition(" ")[0] if given in tried else "–" for given in columns)
        row(measure, "reference", *told, "")
        ours = Peer(measure, "ours", "", lambda x, y, function=function: float(function(x, y)))  # type: ignore[misc]
        for peer in (ours, *(peer for peer in PEERS if peer.measure == measure)):
            of_peer(peer, [given for given in tried if len(given.x) <= peer.most], columns, references)


def of_peer(peer: Peer, tried: Sequence[Given], columns: Sequence[Given], references: Mapping[str, float]) -> None:
    """Print one row."""
    whose = f"{peer.package} `{peer.function}`" if peer.function else peer.package
    if missing(peer.package):
        row(peer.measure, whose, *("–" for _ in columns), "not installed")
        return
    found: dict[str, float | str] = {}
    for given in tried:
        x, y = given.float32()
        found[given.name] = value(lambda x=x, y=y: peer.call(x, y))  # type: ignore[misc]
    cells = (cell(found[g.name], references[g.name]) if g.name in found else "–" for g in columns)
    row(peer.measure, whose, *cells, verdict(peer.other, found, references))


def in_batches(x: Tensor, y: Tensor) -> None:
    """Print how far the values of batches are from the value of the same samples at once."""
    n, generator = len(x), torch.Generator().manual_seed(0)
    sorted_, orders = [torch.arange(n)], [torch.randperm(n, generator=generator) for _ in range(ORDERS)]
    cases = {
        "one batch": (sorted_, n),
        "batches of 64": (orders, 64),
        "batches of 256": (orders, 256),
        "the last of 4": ([order[: n - 60] for order in orders], 64),
        "64, class after class": (sorted_, 64),
        "256, class after class": (sorted_, 256),
    }
    row("measure", "whose", "reference", *cases, "one batch, ReLU in place behind X")
    row(*["---"] * (len(cases) + 4))
    net, overwritten = Layers(x.float(), y.float()), Layers(x.float(), y.float(), in_place=True)
    for measure, package, function, peer in IN_BATCHES:
        whose = f"{package} `{function}`"
        if missing(package):
            row(measure, whose, *("–" for _ in range(len(cases) + 1)), "not installed")
            continue
        told = [spread(measure, peer, net, x, y, *case) for case in cases.values()]
        told.append(spread(measure, peer, overwritten, x, y, sorted_, n))
        row(measure, whose, f"{float(OURS[measure](x, y)):.6f}", *told)


def spread(
    measure: str, peer: OfLayers, net: nn.Module, x: Tensor, y: Tensor, orders: Sequence[Tensor], size: int
) -> str:
    """Return a peer's mean difference and its standard deviation over orders of the samples."""
    differences = []
    for order in orders:
        result = value(lambda order=order: peer(net, batches(order, size)))  # type: ignore[misc]
        if isinstance(result, str):
            return result
        differences.append(result - float(OURS[measure](x[order], y[order])))
    return f"{np.mean(differences):+.2g}" + (f" ± {np.std(differences):.2g}" if len(orders) > 1 else "")


def main() -> None:
    torch.set_num_threads(1)
    for measure, confirmed in CONFIRMED.items():
        result = float(OURS[measure](*golden()))
        if abs(result - confirmed) > 1e-6:
            raise SystemExit(f"{measure} of the golden pair: expected {confirmed}, got {result}")
    print(", ".join(f"{package} {version(package)}" for package in dict.fromkeys(peer.package for peer in PEERS)), "\n")
    of_features(inputs())
    print()
    in_batches(*network())


if __name__ == "__main__":
    main()
