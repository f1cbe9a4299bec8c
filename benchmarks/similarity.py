"""What similarity costs beside other packages: `python -m benchmarks.similarity` (`--quick` for one round).

One process, one thread, rounds interleaved; each cost is a ratio to the fastest bare forward pass over the same probe
in the same round, as median and quartiles of CPU time. Peak memory is that of a process of its own, above a forward's.
The peers come from `pip install --no-deps -r benchmarks/requirements.txt`; one that is missing is said to be.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.nets import ResNet20, digits, trained
from benchmarks.timing import Work, cpu_seconds, peak_mb, ratios, spread
from lightning_interp.similarity import CKA, SVCCA, AnyMeasure, Measure, Procrustes, matrix
from lightning_interp.similarity.activations import Activations, find_activations, representations
from lightning_interp.similarity.history import histories
from lightning_interp.similarity.representation import Form, Representation
from lightning_interp.similarity.results import Snapshot
from lightning_interp.storage.folder import Folder
from lightning_interp.storage.snapshots import new_store

BATCHES = (16, 32, 64, 128, 256)
LAYERS = list(ResNet20.LAYERS)


def forward(net: nn.Module, images: Tensor, batch: int) -> None:
    with torch.no_grad():
        for part in images.split(batch):
            net(part)


def captured(net: nn.Module, images: Tensor, batch: int, form: Form, **options: Any) -> dict[str, Representation]:
    return representations(net, net, images.split(batch), watched(net, images), len(images), form, **options)


def watched(net: nn.Module, images: Tensor) -> Activations:
    return find_activations(net, net, [images[:3], images[:2]]).of(LAYERS)


def ours(net: nn.Module, images: Tensor, **options: Any) -> Tensor:
    return matrix(CKA(), list(captured(net, images, 64, "gram", **options).values()))


def pairwise(net: nn.Module, images: Tensor) -> Tensor:
    """All activations kept, all pairs compared one by one, as one writes it first."""
    kept: dict[str, list[Tensor]] = {layer: [] for layer in LAYERS}

    def keep(layer: str, _: nn.Module, __: Any, output: Tensor) -> None:
        kept[layer].append(output.flatten(1).clone())

    handles = [net.get_submodule(layer).register_forward_hook(partial(keep, layer)) for layer in LAYERS]
    forward(net, images, 64)
    for handle in handles:
        handle.remove()
    features = [torch.cat(parts) for parts in kept.values()]
    features = [x - x.mean(0) for x in features]

    def cka(x: Tensor, y: Tensor) -> float:
        k, m = x @ x.T, y @ y.T
        return float((k * m).sum() / (k.norm() * m.norm()))

    return torch.tensor([[cka(x, y) for y in features] for x in features])


def pytorch_cka(net: nn.Module, images: Tensor) -> Tensor:
    compute = importlib.import_module("cka").compute_cka
    (similarity,) = compute(net, net, _loader(images), layers=LAYERS, progress=False)
    return similarity


def cka_pytorch(net: nn.Module, images: Tensor) -> Tensor:
    layers = ["stem.2", *LAYERS[1:]]  # it does not hook a container; this is the same output
    calculator = importlib.import_module("cka_pytorch.cka").CKACalculator(net, net, layers, verbose=False)
    try:
        return calculator.calculate_cka_matrix(_loader(images), num_epochs=1)
    finally:
        calculator.reset()


def torch_cka(net: nn.Module, images: Tensor) -> Tensor:
    cka = importlib.import_module("torch_cka").CKA(net, net, "a", "b", LAYERS, LAYERS)
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        cka.compare(_loader(images))
    return cka.hsic_matrix


PEERS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "pytorch-cka 1.1.3": pytorch_cka,
    "cka-pytorch 1.1.3": cka_pytorch,
    "torch_cka 0.21": torch_cka,
}


def _loader(images: Tensor) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(images, images[:, 0, 0, 0]), batch_size=256)


def installed(name: str, net: nn.Module) -> bool:
    """Say whether a peer works here: run it on some images."""
    try:
        PEERS[name](net, digits(256)[0])
    except (ImportError, AttributeError, AssertionError) as error:
        print(f"{name}: left out ({error})")
        return False
    return True


def of_memory(name: str, n: int) -> tuple[Work, Work]:
    """Return a forward, and the work whose memory is asked for."""
    net, (images, _) = trained(), digits(n)
    naive = {"all kept, pair by pair": partial(pairwise, net, images)}
    return partial(forward, net, images, 64), (works(net, images) | naive)[name]


def works(net: nn.Module, images: Tensor) -> dict[str, Work]:
    return {
        "ours, exact": partial(ours, net, images),
        "ours, sketch of 1,024": partial(ours, net, images, sketch=1024),
        **{name: partial(peer, net, images) for name, peer in PEERS.items()},
    }


def layer_by_layer(net: nn.Module, n: int, rounds: int, peers: Sequence[str]) -> None:
    """Print the cost of the 12 × 12 CKA matrix by everyone."""
    images, _ = digits(n)
    bare = {f"batches of {batch}": partial(forward, net, images, batch) for batch in BATCHES}
    mine = {name: work for name, work in works(net, images).items() if name in peers or name not in PEERS}
    naive = partial(pairwise, net, images)
    exact = mine["ours, exact"]().float()
    debiased = matrix(CKA(debiased=True), list(captured(net, images, 64, "gram").values())).float()
    found, fastest = ratios(mine, bare, rounds)
    found |= ratios({"all kept, pair by pair": naive}, bare, 1)[0] if n == 512 else {}
    print(f"\nN = {n}; the fastest bare forward takes {statistics.median(fastest):.3f} s")
    print("| | forwards, median (quartiles) | peak MB above the forward's | largest difference from the exact value |")
    print("|---|---|---|---|")
    mine["all kept, pair by pair"] = naive
    for name, values in found.items():
        truth = debiased if name in PEERS else exact
        away = (mine[name]().float().reshape(truth.shape) - truth).abs().max()
        print(f"| {name} | {spread(values)} | {peak_mb(of_memory, name, n):.0f} | {float(away):.1e} |")


def operations(n: int) -> None:
    """Print the least number of operations beside those of the forward."""
    net, images = ResNet20().eval(), digits(3)[0]
    widths = watched(net, images).widths().values()
    products = sum(n * n * width for width in widths)
    macs = 0

    def count(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        macs += output[0].numel() * part.weight[0].numel()  # type: ignore[index]

    convolutions = [part for part in net.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    handles = [part.register_forward_hook(count) for part in convolutions]
    forward(net, images[:1], 1)
    for handle in handles:
        handle.remove()
    print(
        f"N = {n}: forward {2 * n * macs / 1e9:.1f} GFLOP; Gram matrices N² d = {products / 1e9:.1f} GFLOP at least"
        f" (d = {sum(widths):,} in all), half of what X Xᵀ takes without symmetry"
    )


def other_measures(net: nn.Module, rounds: int) -> None:
    """Print what SVCCA and Procrustes take on top, from the same capture."""
    images, _ = digits(512)
    layers = list(captured(net, images, 64, "gram").values())
    for measure in (SVCCA(), Procrustes()):
        work = partial(_matrix_anew, measure, layers)
        seconds = [cpu_seconds(work) for _ in range(rounds)]
        print(f"12 × 12 {measure.name} at N = 512, decompositions included: {spread(seconds)} s")
    print(f"SVCCA keeps {[SVCCA().kept(layer) for layer in layers]} directions")


def _matrix_anew(measure: Measure, layers: Sequence[Representation]) -> Tensor:
    return matrix(measure, [replace(layer) for layer in layers])


def from_storage(epochs: int, rounds: int) -> None:
    """Print the time for all epochs × all layers against the last, from files alone."""
    first, last = trained(seed=1, epochs=1), trained(seed=1, epochs=4)
    images, _ = digits(512)
    measures: dict[str, AnyMeasure] = {"CKA": CKA(), "SVCCA": SVCCA()}
    with tempfile.TemporaryDirectory() as folder:
        store = new_store(Folder(folder), {})
        for epoch in range(epochs + 1):
            net = _between(first, last, epoch / epochs)
            store.append(Snapshot(epoch, epoch, captured(net, images, 64, "scores")))
        megabytes = sum(entry["bytes"] for entry in store.manifest["snapshots"]) / 1e6

        def compared() -> None:
            histories(measures, [store.read(step) for step in store.steps])

        seconds = [cpu_seconds(compared) for _ in range(rounds)]
    print(
        f"{epochs} epochs × 12 layers, CKA and SVCCA, against final and initial, from {megabytes:.0f} MB in files:"
        f" {spread(seconds)} s"
    )


def _between(a: ResNet20, b: ResNet20, share: float) -> ResNet20:
    """Return the network part of the way from one state to another."""
    net = ResNet20().eval()
    ends = a.state_dict(), b.state_dict()
    net.load_state_dict({key: torch.lerp(ends[0][key].float(), ends[1][key].float(), share) for key in ends[0]})
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of everything")
    rounds = 1 if parser.parse_args().quick else 5
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    net = trained()
    peers = [name for name in PEERS if installed(name, net)]
    for n in (512, 1024):
        operations(n)
        layer_by_layer(net, n, rounds if n == 512 else (rounds + 1) // 2, peers)
    print()
    other_measures(net, rounds)
    from_storage(100 if rounds > 1 else 5, min(rounds, 3))


if __name__ == "__main__":
    main()
