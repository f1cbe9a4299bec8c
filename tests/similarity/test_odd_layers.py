"""Layers that a network may well hold, and that must neither mislead nor break."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_interp.similarity import CCA, CKA, SVCCA, Pooling, Procrustes, chance, matrix, prepare
from lightning_interp.similarity.activations import find_activations, representations
from lightning_interp.similarity.history import normalised
from lightning_interp.similarity.matrix import similarity
from lightning_interp.similarity.results import Snapshot
from lightning_interp.storage.folder import Folder
from lightning_interp.storage.snapshots import new_store


class SequenceFirst(nn.Module):
    """A layer in the middle sees (tokens, samples, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("tokens", [2, 3, 5])
def test_the_samples_are_the_dimension_that_changes(tokens: int) -> None:
    net, x = SequenceFirst(), torch.randn(9, tokens, 4)
    watched = find_activations(net, net, [x[:3], x[:2]], Pooling()).of(["up"])
    (found,) = representations(net, net, x.split(3), watched, 9).values()
    assert found.features is not None
    assert torch.allclose(found.features, net.up(x).mean(1).detach(), atol=1e-5)


@pytest.mark.parametrize(("n", "rank", "width"), [(64, 8, 2000), (512, 100, 2000)])
def test_wide_layers_of_low_rank(n: int, rank: int, width: int) -> None:
    """Two linear maps of one thing are the same to CCA, however wide: rounding is no direction."""
    x = torch.randn(n, rank)
    net = nn.ModuleList([nn.Linear(rank, width), nn.Linear(rank, width)])
    net.forward = lambda batch: [layer(batch) for layer in net]  # type: ignore[method-assign]
    watched = find_activations(net, net, [x[:3], x[:2]], Pooling()).of(["0", "1"])
    a, b = representations(net, net, x.split(32), watched, n).values()
    assert a.rank == b.rank == rank
    assert float(CCA().between(a, b)) == pytest.approx(1, abs=1e-4)
    plain = [prepare(layer(x).detach()) for layer in net]
    assert float(CCA().between(*plain)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("form", ["gram", "scores", "features"])
def test_dead_layers_wider_than_the_probe(form: str, tmp_path: Path) -> None:
    dead, alive = prepare(torch.zeros(12, 50)).reduced(form), prepare(torch.randn(12, 50)).reduced(form)  # type: ignore[arg-type]
    store = new_store(Folder(str(tmp_path)), {})
    store.append(Snapshot(0, 0, {"dead": dead, "alive": alive}))
    held = store.read(0).layers
    for measure in (CKA(), CKA(debiased=True), *((SVCCA(0.9), Procrustes()) if form != "gram" else ())):
        for a, b in ((dead, alive), (held["dead"], held["alive"]), (dead, dead)):
            assert measure.between(a, b).isnan()
            assert chance(measure, a, b) != chance(measure, a, b) or measure == CKA(debiased=True)


def test_positions_of_more_channels_than_samples() -> None:
    net, x = nn.Sequential(nn.Conv2d(1, 32, 3)), torch.randn(12, 1, 8, 8)
    watched = find_activations(net, net, [x[:3], x[:2]], Pooling("positions")).of(["0"])
    (found,) = representations(net, net, x.split(5), watched, 12, "gram").values()
    assert (found.n, found.width) == (12 * 16, 32)


def test_a_sketch_and_itself_are_the_same() -> None:
    net, x = nn.Sequential(nn.Linear(8, 2000)), torch.randn(64, 8)
    watched = find_activations(net, net, [x[:3], x[:2]], Pooling()).of(["0"])

    def taken(key: str) -> list[Tensor]:
        return list(representations(net, net, [x], watched, 64, "gram", sketch=64, key=key).values())

    for debiased in (False, True):
        measure = CKA(debiased=debiased)
        assert float(matrix(measure, taken("a"))) == pytest.approx(1)
        assert float(matrix(measure, taken("a"), taken("a"))) == pytest.approx(1)
        assert float(matrix(measure, taken("a"), taken("b"))) == pytest.approx(1, abs=0.25)
    caution = CKA(debiased=True).caution(taken("a")[0])
    assert caution is not None
    assert "estimate from a sketch" in caution.reason


def test_layers_called_a_varying_number_of_times_are_named() -> None:
    class Varies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x)) if len(x) < 5 else self.layer(x)

    net, x = Varies(), torch.randn(12, 4)
    watched = find_activations(net, net, [x[:3], x[:2]], Pooling())
    with pytest.raises(
        ValueError, match=r"layer#1: expected 2 batches, got 1; a layer that is not called equally often"
    ):
        representations(net, net, [x[:4], x[4:]], watched, 12)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_features_are_left_out() -> None:
    net, x = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3)), torch.randn(6, 4)
    assert list(find_activations(net, net, [x[:3], x[:2]], Pooling()).layouts) == ["1", ""]


def test_functions_may_give_floats_and_refuse_other_widths() -> None:
    def distance(x: Tensor, y: Tensor) -> float:
        return float((x - y).norm())

    same, other = prepare(torch.randn(9, 3)), prepare(torch.randn(9, 4))
    assert float(similarity(distance, same, same)) == 0
    assert similarity(distance, same, other).isnan()


def test_the_share_of_the_way_of_any_measure() -> None:
    values = torch.tensor([[0.2, 0.6, 1.0], [3.0, 1.5, 0.0], [0.995, 0.9, 1.0]], dtype=torch.float64)
    way = normalised(values)
    assert way[:2].tolist() == [[0, pytest.approx(0.5), 1], [0, pytest.approx(0.5), 1]]
    assert way[2].isnan().all()
