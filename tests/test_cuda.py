"""The same on a GPU, where there is one: the same numbers, the same training, mixed precision."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_interp import DataInfluence, InputAttribution, RepresentationSimilarity
from lightning_interp.influence import InfluenceFunction
from lightning_interp.similarity import CKA, PWCCA, SVCCA, Procrustes, RBFKernel, matrix
from lightning_interp.similarity.activations import find_activations, representations
from lightning_interp.similarity.representation import Representation
from lightning_interp.storage.folder import Folder
from lightning_interp.storage.snapshots import open_store
from tests.models import Net, Shapes, loaders, trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_measures_on_the_device_equal_those_on_the_cpu() -> None:
    x, y = torch.randn(64, 200) + 100, torch.randn(64, 20)
    for measure in (CKA(), CKA(debiased=True), CKA(RBFKernel()), SVCCA(0.5), Procrustes()):
        there = measure(x.cuda(), y.cuda())
        assert float(there) == pytest.approx(float(measure(x, y)), abs=1e-6), measure
    assert float(PWCCA()(y.cuda(), y.cuda())) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_a_capture_equals_that_on_the_cpu_whatever_precision_is_set(precision: str) -> None:
    net, images = Net().eval(), torch.stack([Shapes(60)[i][0] for i in range(60)])

    def taken(device: str) -> list[Representation]:
        module, batches = net.to(device), images.to(device).split(16)
        watched = find_activations(module, module, [batches[0][:3], batches[0][:2]]).of(["conv1", "conv2", "head"])
        return list(representations(module, module, batches, watched, 60, "gram").values())

    torch.set_float32_matmul_precision(precision)
    try:
        there, here = taken("cuda"), taken("cpu")
    finally:
        torch.set_float32_matmul_precision("highest")
    for a, b in zip(there, here, strict=True):
        assert a.values.device.type == "cpu"
        loose = 1e-2 if precision == "medium" else 1e-4  # the network itself is rounded more
        assert torch.allclose(a.gram, b.gram, rtol=loose, atol=loose * float(b.gram.abs().max()))
    assert torch.allclose(matrix(CKA(), there), matrix(CKA(), here), atol=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run_is_the_same_with_and_without_the_callbacks(precision: str, tmp_path: Path) -> None:
    def weights(callbacks: list[L.Callback]) -> tuple[dict[str, Tensor], L.Trainer]:
        L.seed_everything(0, verbose=False)
        module = Net()
        fit = trainer(tmp_path, accelerator="gpu", devices=1, precision=precision, callbacks=callbacks)
        fit.fit(module, *loaders())
        return {name: value.cpu() for name, value in module.state_dict().items()}, fit

    torch.backends.cudnn.deterministic = True
    bare, _ = weights([])
    watched, fit = weights(
        [
            RepresentationSimilarity(samples=8, on_error="raise"),
            InputAttribution(samples=2, on_error="raise"),
            DataInfluence(queries=2, estimator=InfluenceFunction(damping=0.01), on_error="raise"),
        ]
    )
    for name, value in bare.items():
        assert torch.equal(value, watched[name]), name
    store = open_store(Folder(str(Path(fit.log_dir) / "interp" / "similarity")))
    final = store.read(store.steps[-1]).layers["conv2"]
    assert float(CKA().between(final, final)) == pytest.approx(1, abs=1e-6)
    assert (Path(fit.log_dir) / "interp" / "report.html").exists()
