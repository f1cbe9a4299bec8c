"""What the similarity callback stores, logs and takes over from a killed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_interp import RepresentationSimilarity
from lightning_interp.similarity import CCA, CKA, SVCCA, Procrustes, RBFKernel
from lightning_interp.storage import Folder, open_store
from tests.models import Net, Shapes, loaders, trainer


def store_of(fit: L.Trainer) -> Any:
    return open_store(Folder(str(Path(fit.log_dir) / "interp" / "similarity")))


def curve(fit: L.Trainer, tag: str) -> list[tuple[int, float]]:
    fit.logger.finalize("success")
    events = EventAccumulator(fit.log_dir, size_guidance={"scalars": 0}).Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def features(module: Net) -> Tensor:
    held: list[Tensor] = []
    handle = module.conv2.register_forward_hook(lambda _, __, out: held.append(out.detach().flatten(1)))
    images = torch.stack([Shapes(12, seed=1)[i][0] for i in range(12)])
    mode = module.training
    module.eval()(images)
    module.train(mode)
    handle.remove()
    return held[0]


class Keeps(L.Callback):
    """Takes the features itself, from the live network, at the moments that the callback claims."""

    def __init__(self) -> None:
        self.taken: dict[int, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.taken[trainer.global_step] = features(pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.taken[trainer.global_step] = features(pl_module)


def test_the_curves_are_those_of_the_live_network(tmp_path: Path) -> None:
    keeps = Keeps()
    fit = trainer(tmp_path, max_epochs=3, callbacks=[keeps, RepresentationSimilarity(["conv2"], [CKA()])])
    fit.fit(Net(), *loaders())
    steps = sorted(keeps.taken)
    assert steps == [0, 3, 6, 9]
    first, last = keeps.taken[0], keeps.taken[9]
    to_initial = [(s, float(CKA()(first, keeps.taken[s]))) for s in steps[1:]]
    to_final = [(s, float(CKA()(keeps.taken[s], last))) for s in steps]
    for tag, expected in (("similarity_to_initial", to_initial), ("similarity_to_final", to_final)):
        for (step, value), (at, logged) in zip(expected, curve(fit, f"{tag}/CKA/conv2"), strict=True):
            assert step == at
            assert logged == pytest.approx(value, abs=1e-5)
    store = store_of(fit)
    assert store.steps == steps
    assert [store.read(s).epoch for s in steps] == [0, 1, 2, 3]
    assert store.manifest["probe"]["n"] == 12


def test_default_layers_are_the_weighted_ones_in_call_order(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=1, callbacks=[RepresentationSimilarity()])
    fit.fit(Net(), *loaders())
    assert list(store_of(fit).read(0).layers) == ["conv1", "conv2", "head"]


def test_training_that_ends_inside_an_epoch_ends_with_its_last_state(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=-1, max_steps=5, callbacks=[RepresentationSimilarity(["head"])])
    fit.fit(Net(), *loaders())
    assert store_of(fit).steps[-1] == 5


class Killed(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 3:
            raise RuntimeError("power cut")


def test_a_killed_run_resumes_with_its_history(tmp_path: Path) -> None:
    def options(epochs: int) -> dict[str, Any]:
        keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_epochs=1, filename="{epoch}")
        return {"max_epochs": epochs, "callbacks": [RepresentationSimilarity(["conv2"]), keep]}

    killed = options(5)
    killed["callbacks"].append(Killed())
    L.seed_everything(0, verbose=False)
    first = trainer(tmp_path, **killed)
    with pytest.raises(RuntimeError, match="power cut"):
        first.fit(Net(), *loaders())
    assert store_of(first).steps == [0, 3, 6, 9]

    again = trainer(tmp_path, **options(5))
    again.fit(Net(), *loaders(), ckpt_path=tmp_path / "kept" / "epoch=1.ckpt")
    assert again.log_dir != first.log_dir
    assert store_of(again).steps == [0, 3, 6, 9, 12, 15]
    for step in (0, 3, 6):
        old, new = (store_of(fit).read(step).layers["conv2"] for fit in (first, again))
        assert torch.equal(old.values, new.values)
    assert [step for step, _ in curve(again, "similarity_to_final/CKA/conv2")] == [0, 3, 6, 9, 12, 15]
    shorter = trainer(tmp_path, **options(4), limit_train_batches=2)
    shorter.fit(Net(), *loaders(), ckpt_path=tmp_path / "kept" / "epoch=1.ckpt")
    assert store_of(shorter).steps == [0, 3, 6, 8, 10], "what the killed run did after the checkpoint is left behind"
    initial = store_of(first).read(0).layers["conv2"]
    now = store_of(again).read(15).layers["conv2"]
    last = dict(curve(again, "similarity_to_initial/CKA/conv2"))[15]
    assert last == pytest.approx(float(CKA().between(initial, now)), abs=1e-6)


def test_a_resumed_run_on_other_samples_declines(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", filename="last")
    trainer(tmp_path, max_epochs=1, callbacks=[RepresentationSimilarity(["conv2"]), keep]).fit(Net(), *loaders())
    other = RepresentationSimilarity(["conv2"], probe=Shapes(12, seed=5))
    with pytest.warns(UserWarning, match="probe's samples differ from those of the run"):
        trainer(tmp_path, max_epochs=2, callbacks=[other]).fit(
            Net(), *loaders(), ckpt_path=tmp_path / "kept" / "last.ckpt"
        )


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=1, callbacks=[RepresentationSimilarity(["conv2"])])
    module = Net()
    fit.fit(module, *loaders())
    fit.fit_loop.max_epochs = 2
    fit.fit(module, *loaders())
    assert store_of(fit).steps == [0, 3, 6]


def test_the_same_callback_in_a_new_trainer_starts_anew(tmp_path: Path) -> None:
    callback = RepresentationSimilarity(["conv2"])
    for _ in range(2):
        fit = trainer(tmp_path, max_epochs=1, callbacks=[callback])
        fit.fit(Net(), *loaders())
        assert store_of(fit).steps == [0, 3]


def test_all_measures_of_stored_representations(tmp_path: Path) -> None:
    measures = [CKA(RBFKernel()), CCA(), SVCCA(0.9), Procrustes(), Procrustes(angle=True)]
    fit = trainer(tmp_path, max_epochs=1, callbacks=[RepresentationSimilarity(["head"], measures)])
    fit.fit(Net(), *loaders())
    for measure in measures:
        same = 0 if measure == Procrustes(angle=True) else 1
        tag = f"similarity_to_final/{measure.name}/head"
        assert dict(curve(fit, tag))[3] == pytest.approx(same, abs=1e-3)


class Squares:
    """A user's own measure: one name, one function."""

    name = "squares"

    def between(self, x: Any, y: Any) -> Tensor:
        return (x.u.T @ y.u).square().sum() / max(x.rank, y.rank)


def test_a_users_own_measure(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=1, callbacks=[RepresentationSimilarity(["conv2"], [Squares()])])
    fit.fit(Net(), *loaders())
    assert dict(curve(fit, "similarity_to_final/squares/conv2"))[3] == pytest.approx(1, abs=1e-5)
