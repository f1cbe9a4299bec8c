"""What the similarity callback stores, logs and takes over from a killed run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_interp import RepresentationSimilarity
from lightning_interp.similarity import CCA, CKA, PWCCA, SVCCA, Procrustes, RBFKernel
from lightning_interp.storage.folder import Folder
from lightning_interp.storage.snapshots import open_store
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


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
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


def events(fit: L.Trainer) -> EventAccumulator:
    fit.logger.finalize("success")
    return EventAccumulator(fit.log_dir, size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def test_snapshots_every_so_many_steps_or_epochs(tmp_path: Path) -> None:
    by_steps = trainer(tmp_path, max_epochs=3, callbacks=[RepresentationSimilarity(["head"], every_n_steps=2)])
    by_steps.fit(Net(), *loaders())
    assert store_of(by_steps).steps == [0, 2, 4, 6, 8, 9]
    assert [store_of(by_steps).read(s).epoch for s in (0, 2, 4, 6, 8, 9)] == [0, 0, 1, 2, 2, 3]
    by_epochs = trainer(tmp_path, max_epochs=5, callbacks=[RepresentationSimilarity(["head"], every_n_epochs=2)])
    by_epochs.fit(Net(), *loaders())
    assert store_of(by_epochs).steps == [0, 6, 12, 15]


def test_steps_under_accumulation_are_counted_once(tmp_path: Path) -> None:
    callback = RepresentationSimilarity(["head"], every_n_steps=1)
    fit = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=3, callbacks=[callback])
    fit.fit(Net(), *loaders(n=48))
    assert store_of(fit).steps == [0, 1, 2]


def test_normalised_curves_maps_and_doubts(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=5, callbacks=[RepresentationSimilarity(["conv2"], [CKA(), SVCCA(0.9)])])
    fit.fit(Net(), *loaders())
    raw = [value for _, value in curve(fit, "similarity_to_final/CKA/conv2")]
    way = [value for _, value in curve(fit, "similarity_to_final_normalised/CKA/conv2")]
    assert way == pytest.approx([(s - raw[0]) / (1 - raw[0]) for s in raw], abs=1e-4)
    assert (way[0], way[-1]) == pytest.approx((0, 1), abs=1e-5)
    held = events(fit)
    for name in ("layer_by_epoch_to_initial", "layer_by_epoch_to_final", "layer_by_epoch_to_final_normalised"):
        assert len(held.Images(f"similarity_maps/CKA/{name}")) == 1
    assert [image.step for image in held.Images("similarity_maps/CKA/layer_by_layer_to_final")] == [0, 6, 9]
    text = held.Tensors("similarity_doubt/CKA/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| conv2 | " in text
    row = text.splitlines()[2].split(" | ")
    assert float(row[1]) == pytest.approx(raw[0], abs=1e-3)
    assert 0 < float(row[2]) < 1
    assert 0 < float(row[3]) < 1


def test_storage_is_as_small_as_the_measures_allow(tmp_path: Path) -> None:
    def forms(**options: Any) -> dict[str, str]:
        fit = trainer(tmp_path, max_epochs=1, callbacks=[RepresentationSimilarity(**options)])
        fit.fit(Net(), *loaders())
        return {layer: kept.form for layer, kept in store_of(fit).read(0).layers.items()}

    assert forms(measures=[CKA()]) == {"conv1": "gram", "conv2": "gram", "head": "features"}
    assert forms(measures=[SVCCA()]) == {"conv1": "scores", "conv2": "scores", "head": "features"}
    everything = {"conv1": "features", "conv2": "features", "head": "features"}
    assert forms(measures=[CKA()], store="activations") == everything


def test_stored_activations_are_those_of_the_network(tmp_path: Path) -> None:
    module = Net()
    fit = trainer(tmp_path, max_epochs=1, callbacks=[RepresentationSimilarity(["conv2"], store="activations")])
    fit.fit(module, *loaders())
    assert torch.allclose(store_of(fit).read(3).layers["conv2"].features, features(module), atol=1e-6)


def first_neuron(x: Tensor, y: Tensor) -> Tensor:
    """A function of the user's own on two tensors."""
    return torch.corrcoef(torch.stack([x[:, 0], y[:, 0]]))[0, 1]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_measures_of_the_neurons_themselves(tmp_path: Path) -> None:
    for store, known in (("compact", False), ("activations", True)):
        measures = [PWCCA(), first_neuron]
        fit = trainer(tmp_path, max_epochs=1, callbacks=[RepresentationSimilarity(None, measures, store=store)])
        fit.fit(Net(), *loaders())
        assert dict(curve(fit, "similarity_to_final/PWCCA/head"))[3] == pytest.approx(1, abs=1e-5)
        assert dict(curve(fit, "similarity_to_final/first_neuron/head"))[3] == pytest.approx(1, abs=1e-5)
        wide = dict(curve(fit, "similarity_to_final/first_neuron/conv2"))[3]
        assert (wide == pytest.approx(1, abs=1e-5)) if known else wide != wide
        notes = events(fit).Tensors("similarity_notes/probe/text_summary")[0].tensor_proto.string_val[0].decode()
        assert ("not defined without the neurons" in notes) is not known


def test_pooled_maps_are_named(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=1, callbacks=[RepresentationSimilarity(["conv2"], [CKA()], maps="pool")])
    fit.fit(Net(), *loaders())
    assert dict(curve(fit, "similarity_to_final/CKA_maps_pool/conv2"))[3] == pytest.approx(1, abs=1e-5)
    assert store_of(fit).read(0).layers["conv2"].width == 6
    positions = RepresentationSimilarity(["conv1", "head"], [CKA()], maps="positions")
    fit = trainer(tmp_path, max_epochs=1, callbacks=[positions])
    fit.fit(Net(), *loaders())
    assert [kept.n for kept in store_of(fit).read(0).layers.values()] == [12 * 16, 12]
    assert dict(curve(fit, "similarity_to_final/CKA_maps_positions/conv1"))[3] == pytest.approx(1, abs=1e-5)


def test_any_number_in_one_trainer_keep_apart(tmp_path: Path) -> None:
    kinds = [("conv2", "flatten"), ("conv2", "pool"), ("conv1", "flatten"), ("head", "flatten")]
    callbacks = [RepresentationSimilarity([layer], [CKA()], maps=maps) for layer, maps in kinds]
    fit = trainer(tmp_path, max_epochs=1, callbacks=callbacks)
    fit.fit(Net(), *loaders())
    folder, rooms = Path(fit.log_dir) / "interp", ["similarity", *(f"similarity-{n}" for n in (2, 3, 4))]
    widths = [layer.width for room in rooms for layer in open_store(Folder(str(folder / room))).read(3).layers.values()]
    assert widths == [54, 6, 256, 3]
    page = (folder / "report.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "How the layers changed",
        *(f"How the layers changed ({room})" for room in rooms[1:]),
    ]
    log = events(fit)
    for room in rooms:
        name = "CKA_maps_pool" if room == "similarity-2" else "CKA"
        assert log.Tensors(f"{room}_notes/probe/text_summary")
        assert len(log.Images(f"{room}_maps/{name}/layer_by_layer")) == 1
        assert len(log.Scalars(f"interp_seconds/RepresentationSimilarity{room.removeprefix('similarity')}")) == 2


def test_the_history_is_thinned_within_its_budget(tmp_path: Path) -> None:
    one = trainer(tmp_path, max_epochs=1, callbacks=[RepresentationSimilarity(["conv2"])])
    one.fit(Net(), *loaders())
    size = store_of(one).manifest["snapshots"][0]["bytes"]
    callback = RepresentationSimilarity(["conv2"], budget_mb=5.5 * size / 1e6)
    fit = trainer(tmp_path, max_epochs=16, callbacks=[callback])
    with pytest.warns(UserWarning, match="snapshots outgrow budget_mb"):
        fit.fit(Net(), *loaders())
    store = store_of(fit)
    assert store.steps[0] == 0
    assert store.steps[-1] == 48
    assert len(store.steps) == 5
    gaps = [b - a for a, b in zip(store.steps, store.steps[1:], strict=False)]
    assert max(gaps) <= 2 * min(gaps) + 3
    kept = sorted(file.name for file in Path(store.folder.path).glob("*.safetensors"))
    assert kept == [entry["file"] for entry in store.manifest["snapshots"]]
    assert len(curve(fit, "similarity_to_final/CKA/conv2")) == 5
    notes = events(fit).Tensors("similarity_notes/probe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "12 snapshots between the first and the last were deleted" in notes


def test_a_sketch_is_an_estimate_and_says_so(tmp_path: Path) -> None:
    callback = RepresentationSimilarity(["conv1"], [CKA(debiased=True)], sketch=64)
    fit = trainer(tmp_path, max_epochs=1, callbacks=[callback])
    fit.fit(Net(), *loaders())
    assert store_of(fit).read(0).layers["conv1"].sketch == 64
    notes = events(fit).Tensors("similarity_notes/probe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "reduced to 64 features by random signs" in notes
    with pytest.raises(ValueError, match="expected kinds of linear CKA as measures"):
        RepresentationSimilarity(sketch=64)


class Words(L.LightningModule):
    """Token ids with padding, through an embedding, a recurrent layer and a transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.recurrent = nn.GRU(8, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = self.recurrent(x.transpose(0, 1))[0].transpose(0, 1)
        x = self.block(x, src_key_padding_mask=attention_mask == 0)
        return self.head(x[:, 0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sentences(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(index)
        length = 3 + index % 5
        ids = torch.zeros(8, dtype=torch.long)
        ids[:length] = torch.randint(1, 20, (length,), generator=draw)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor(index % 2)}


@pytest.mark.parametrize("tokens", ["mean", "cls", "positions"])
def test_text_with_masks(tokens: str, tmp_path: Path) -> None:
    callback = RepresentationSimilarity(
        ["embed", "recurrent", "block", "head"], [CKA()], tokens=tokens, probe=Sentences(), store="activations"
    )
    fit = trainer(tmp_path, max_epochs=1, callbacks=[callback])
    module = Words()
    fit.fit(module, DataLoader(Sentences(), 8))
    held = store_of(fit).read(3).layers
    batch = default_collate([Sentences()[i] for i in range(24)])
    states, mask = module.embed(batch["input_ids"]).detach(), batch["attention_mask"].bool()
    expected = {
        "mean": (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
        "cls": states[:, 0],
        "positions": states[mask],
    }[tokens]
    assert torch.allclose(held["embed"].features, expected, atol=1e-6)
    assert [held[layer].n for layer in ("recurrent", "block")] == [len(expected)] * 2
    assert held["head"].n == 24
