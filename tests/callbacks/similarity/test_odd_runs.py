"""Runs that the similarity callback must come through: odd networks, failing measures, changed arguments."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_interp import RepresentationSimilarity, compare
from lightning_interp.data.task import Task
from lightning_interp.similarity import CKA, SVCCA, Procrustes
from lightning_interp.similarity.history import layer_by_layer
from tests.callbacks.similarity.test_callback import Sentences, curve, events, first_neuron, store_of
from tests.models import Net, Shapes, loaders, trainer


class Head(L.LightningModule):
    """Training by the squares of what forward gives."""

    def training_step(self, batch: Any, _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("loss", self.training_step(batch, 0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Attends(Head):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.enc = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.enc(x[:, 0]).mean(1))


class Ends(Head):
    """The last thing is a product with a parameter of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        self.w = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) @ self.w


def layers_of(module: L.LightningModule, folder: Path, **options: Any) -> list[str]:
    fit = trainer(folder, max_epochs=1, callbacks=[RepresentationSimilarity(**options)])
    fit.fit(module, *loaders())
    return list(store_of(fit).read(0).layers)


def text_of(fit: L.Trainer, tag: str) -> str:
    return events(fit).Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()


def test_patterns_pass_over_what_is_not_called(tmp_path: Path) -> None:
    found = layers_of(Attends(), tmp_path, layers=["enc.*", "head"], measures=[CKA()])
    assert "enc.layers.0.self_attn" in found
    assert not {"enc.layers", "enc.layers.0.self_attn.out_proj"} & set(found)
    for name in ("enc.layers", "*.out_proj"):
        with pytest.raises(ValueError, match=r"expected layers that forward calls.*got " + name.replace("*", r"\*")):
            layers_of(Attends(), tmp_path, layers=["head", name])


def test_attention_is_a_layer(tmp_path: Path) -> None:
    assert layers_of(Attends(), tmp_path, measures=[CKA()]) == [
        "enc.layers.0.self_attn",
        "enc.layers.0.linear1",
        "enc.layers.0.linear2",
        "head",
    ]


def test_the_output_is_included(tmp_path: Path) -> None:
    module = Ends()
    fit = trainer(tmp_path, max_epochs=1, callbacks=[RepresentationSimilarity(measures=[CKA()], store="activations")])
    fit.fit(module, *loaders())
    held = store_of(fit).read(3).layers
    assert list(held) == ["net.1", "output"]
    images = torch.stack([Shapes(12, seed=1)[i][0] for i in range(12)])
    assert torch.allclose(held["output"].features, module(images).detach(), atol=1e-6)
    assert layers_of(Ends(), tmp_path, layers=["output"], measures=[CKA()]) == ["output"]
    assert layers_of(Net(), tmp_path, layers=["conv2", "output"], measures=[CKA()]) == ["conv2", "output"]
    assert layers_of(Ends(), tmp_path, layers=["*"], measures=[CKA()]) == ["net.0", "net.1", "net"]


class Both(Net):
    """A layer that goes by the name of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(super().forward(x)) * 2


def test_a_layer_called_output_keeps_its_name(tmp_path: Path) -> None:
    assert layers_of(Both(), tmp_path, measures=[CKA()]) == ["conv1", "conv2", "head", "output"]


def needs_equal_widths(x: Tensor, y: Tensor) -> Tensor:
    if x.shape != y.shape:
        raise TypeError("not the same shape")
    return (x - y).square().mean()


def test_a_measure_that_refuses_other_widths_is_not_defined_for_them(tmp_path: Path) -> None:
    callback = RepresentationSimilarity(measures=[needs_equal_widths, CKA()], store="activations", on_error="raise")
    fit = trainer(tmp_path, max_epochs=1, callbacks=[callback])
    fit.fit(Net(), *loaders())
    assert dict(curve(fit, "similarity_to_final/needs_equal_widths/head"))[3] == pytest.approx(0, abs=1e-6)


class Tires:
    """A measure that works for its first calls."""

    name = "tires"

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def between(self, x: Any, y: Any) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise KeyError("tired")
        return CKA().between(x, y)


@pytest.mark.parametrize("calls", [1, 2, 4, 12])
def test_one_failing_measure_leaves_the_others_alone(calls: int, tmp_path: Path) -> None:
    callback = RepresentationSimilarity(["conv2"], [Tires(calls), CKA()])
    fit = trainer(tmp_path, max_epochs=2, callbacks=[callback])
    with pytest.warns(UserWarning, match=r"(?s)tires failed and is left out from now on.*KeyError.*tired") as caught:
        fit.fit(Net(), *loaders())
    assert sum("tires failed" in str(w.message) for w in caught) == 1
    assert [step for step, _ in curve(fit, "similarity_to_final/CKA/conv2")] == [0, 3, 6]
    assert "tires failed, and is left out: 'tired'" in text_of(fit, "similarity_notes/probe")
    assert "tired" in text_of(fit, "interp_errors/RepresentationSimilarity")
    assert len(list(Path(store_of(fit).folder.path).glob("CKA-*.png"))) == 6


def test_all_measures_failing_is_a_failure(tmp_path: Path) -> None:
    callback = RepresentationSimilarity(["conv2"], [Tires(2)])
    with pytest.warns(UserWarning, match=r"(?s)is off for this run: it failed.*tired"):
        trainer(tmp_path, max_epochs=2, callbacks=[callback]).fit(Net(), *loaders())
    raising = RepresentationSimilarity(["conv2"], [Tires(2), CKA()], on_error="raise")
    with pytest.raises(KeyError, match="tired"):
        trainer(tmp_path, max_epochs=2, callbacks=[raising]).fit(Net(), *loaders())


def test_a_measure_that_gives_no_number_is_named_before_the_first_batch(tmp_path: Path) -> None:
    def per_neuron(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(0)

    module = Net()
    with pytest.raises(ValueError, match=r"measures=\.\.\.\): per_neuron failed on a layer and itself"):
        trainer(tmp_path, callbacks=[RepresentationSimilarity(measures=[per_neuron])]).fit(module, *loaders())
    assert not module.fed


class Dead(Net):
    """The first layer gives the same for all samples; the second starts so."""

    def __init__(self) -> None:
        super().__init__()
        self.dead, self.late = nn.Linear(3, 200), nn.Linear(3, 200)
        nn.init.zeros_(self.dead.weight)
        nn.init.zeros_(self.late.weight)
        self.dead.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + self.dead(out).mean() + self.late(out)[:, :3]


@pytest.mark.parametrize("measure", [CKA(), SVCCA(0.9)], ids=lambda m: m.name)
def test_constant_layers_are_named(measure: Any, tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=1, callbacks=[RepresentationSimilarity(["dead", "late", "head"], [measure])])
    fit.fit(Dead(), *loaders())
    rows = {row.split(" | ")[0]: row for row in text_of(fit, f"similarity_doubt/{measure.name}").splitlines()}
    for layer in ("| dead", "| late"):
        assert "| – |" in rows[layer]
        assert "the same for all samples, so that no similarity is defined (at the start)" in rows[layer]
    assert "same for all samples" not in rows["| head"]
    notes = text_of(fit, "similarity_notes/probe")
    assert "dead (at epoch 0 and at epoch 1), late (at epoch 0): the same for all samples" in notes


class Classed(L.LightningModule):
    """A class token is put before the sentence, or the sentence is doubled."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.repeats = repeats
        self.embed = nn.Embedding(20, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = torch.cat([x[:, :1] * 0 + 1, x], 1) if self.repeats == 1 else torch.cat([x] * self.repeats, 1)
        return self.head(self.mix(x)[:, 0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_mask_of_another_length_is_said_once(tmp_path: Path) -> None:
    for repeats in (1, 3):
        callback = RepresentationSimilarity(["embed", "mix"], [CKA()], probe=Sentences())
        fit = trainer(tmp_path, max_epochs=1, callbacks=[callback])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit.fit(Classed(repeats), DataLoader(Sentences(), 8))
        said = [str(w.message) for w in caught if "task.mask" in str(w.message)]
        assert len(said) == (repeats == 3)
        assert all("number of tokens than mix have" in message for message in said)
        assert ("All tokens count in mix" in text_of(fit, "similarity_notes/probe")) is (repeats == 3)


def test_two_maps_of_one_epoch_are_told_apart(tmp_path: Path) -> None:

    fit = trainer(tmp_path, max_epochs=2, callbacks=[RepresentationSimilarity(["head"], [CKA()], every_n_steps=1)])
    fit.fit(Net(), *loaders())
    store = store_of(fit)
    tables = [layer_by_layer("CKA", CKA(), store.read(step), store.read(6)) for step in (0, 1)]
    assert [table.title for table in tables] == [f"layers at epoch 0 (step {step}) and at the end" for step in (0, 1)]


@pytest.mark.parametrize("every", [2, 3])
def test_the_last_epoch_is_the_number_of_finished_ones(every: int, tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=3, callbacks=[RepresentationSimilarity(["head"], [CKA()], every_n_steps=every)])
    fit.fit(Net(), *loaders())
    assert [entry["epoch"] for entry in store_of(fit).manifest["snapshots"]][-1] == 3
    stopped = trainer(tmp_path, max_epochs=-1, max_steps=5, callbacks=[RepresentationSimilarity(["head"], [CKA()])])
    stopped.fit(Net(), *loaders())
    assert [(e["step"], e["epoch"]) for e in store_of(stopped).manifest["snapshots"]] == [(0, 0), (3, 1), (5, 1)]
    two = compare(fit.log_dir, fit.log_dir, measures=[CKA()], epochs=[2, 3])
    assert two.maps["CKA"][0].title == "epoch 2 and epoch 3"


class Compiled(Head):
    def __init__(self, compiled: bool) -> None:
        super().__init__()
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
        self.net = torch.compile(net, backend="eager") if compiled else net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.filterwarnings("ignore")
def test_what_is_inside_a_compiled_module_keeps_its_name(tmp_path: Path) -> None:
    runs = []
    for compiled in (False, True):
        callback = RepresentationSimilarity(measures=[CKA()])
        fit = trainer(tmp_path, max_epochs=1, callbacks=[callback])
        L.seed_everything(0, verbose=False)
        fit.fit(Compiled(compiled), *loaders())
        assert list(store_of(fit).read(0).layers) == ["net.1", "net.3"]
        runs.append(fit.log_dir)
    assert compare(*runs, measures=[CKA()]).same_layers("CKA")["net.3"] == pytest.approx([1], abs=1e-4)
    assert layers_of(Compiled(True), tmp_path, layers=["net.3", "net"], measures=[CKA()]) == ["net.3", "net"]


def test_the_key_of_the_state_tells_any_choice() -> None:
    plain = {"measures": [CKA()]}
    others: list[dict[str, Any]] = [
        {"samples": 8},
        {"probe": Shapes(12)},
        {"probe": Shapes(10)},
        {"every_n_epochs": 2},
        {"every_n_steps": 2},
        {"store": "activations"},
        {"sketch": 64},
    ]
    keys = [RepresentationSimilarity(**plain, **other).state_key for other in ({}, *others)]
    assert len(set(keys)) == len(keys)
    assert RepresentationSimilarity(**plain, probe=Shapes(12)).state_key == keys[2]


def test_a_budget_for_less_than_two_snapshots_is_said_once(tmp_path: Path) -> None:
    callback = RepresentationSimilarity(["conv2"], [CKA()], budget_mb=1e-5)
    with pytest.warns(UserWarning, match=r"first and the last snapshot alone take .* MB, more than budget_mb=1e-05"):
        trainer(tmp_path, max_epochs=1, callbacks=[callback]).fit(Net(), *loaders())


def _resumed_with(folder: Path, before: dict[str, Any], after: dict[str, Any]) -> L.Trainer:
    keep = ModelCheckpoint(folder / "kept", filename="last")
    first = trainer(folder, max_epochs=1, callbacks=[RepresentationSimilarity(**before), keep])
    first.fit(Net(), *loaders())
    fit = trainer(folder, max_epochs=2, callbacks=[RepresentationSimilarity(**after)])
    fit.fit(Net(), *loaders(), ckpt_path=folder / "kept" / "last.ckpt")
    return fit


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_changed_measures_keep_the_initial_state(tmp_path: Path) -> None:
    before = {"layers": ["conv2", "head"], "measures": [CKA(), SVCCA(0.9)]}
    fit = _resumed_with(tmp_path, before, {"layers": ["conv2"], "measures": [Procrustes()], "every_n_epochs": 1})
    assert store_of(fit).steps == [0, 3, 6]
    assert [step for step, _ in curve(fit, "similarity_to_final/Procrustes_similarity/conv2")] == [0, 3, 6]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("after", "says"),
    [
        ({"measures": [SVCCA(0.9)]}, "its measures need more of the initial network than"),
        ({"measures": [CKA()], "maps": "pool"}, "its maps= differs from .* 'flatten'"),
        ({"measures": [CKA()], "layers": ["conv1"]}, "its layers differ from"),
    ],
)
def test_what_an_initial_state_cannot_serve_switches_off(after: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"RepresentationSimilarity is off for this run: {says}"):
        _resumed_with(tmp_path, {"layers": ["conv2"], "measures": [CKA()]}, {"layers": ["conv2"], **after})


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:invalid value encountered")
def test_the_words_fit_the_measure(tmp_path: Path) -> None:
    measures = [CKA(), Procrustes(angle=True), first_neuron]
    fit = trainer(tmp_path, max_epochs=1, callbacks=[RepresentationSimilarity(["head"], measures, task=Task())])
    fit.fit(Net(), *loaders())
    notes = text_of(fit, "similarity_notes/probe")
    assert "CKA: 1 means the same up to the measure's invariance, 0 unrelated." in notes
    assert "Procrustes_angle: a distance, 0 means the same" in notes
    assert "first_neuron: values are on the function's own scale." in notes
    assert "distance of start and end" in text_of(fit, "similarity_doubt/Procrustes_angle")
