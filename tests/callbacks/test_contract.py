"""One suite over every exported callback: zero configuration, documented tags, errors, loggers, resuming."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_interp import DataInfluence, InputAttribution, RepresentationSimilarity, Task
from lightning_interp.similarity import CKA, SVCCA
from lightning_interp.storage.folder import Folder
from lightning_interp.storage.snapshots import open_store
from tests.models import Net, Shapes, loaders, trainer

CALLBACKS = [RepresentationSimilarity, InputAttribution, DataInfluence]
DEFAULT_MEASURES = [CKA(debiased=True), CKA(), SVCCA()]
USERS = {"epoch", "test_loss", "train_loss_step", "train_loss_epoch", "val_accuracy", "hp_metric"}


def make(kind: type, **options: Any) -> L.Callback:
    """Return a callback of little work that raises its errors; the tests that leave all out have the defaults."""
    small = {
        RepresentationSimilarity: {"samples": 8, "measures": [CKA()]},
        InputAttribution: {"samples": 2},
        DataInfluence: {"queries": 2},
    }
    return kind(**small[kind] | {"on_error": "raise"} | options)


def tags_of(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"scalars": set(), "images": set(), "tensors": set()}
    for file in folder.rglob("events.out*"):
        events = EventAccumulator(str(file), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
        events.Reload()
        for kind, tags in found.items():
            tags |= {tag.removesuffix("/text_summary") for tag in events.Tags()[kind]}
    return found


def documented(kind: type) -> set[str]:
    """Return the tags in a callback's docstring as patterns: capitals stand for names."""
    listed = re.findall(r"`(\w+(?:/[\w.]+)+)`", kind.__doc__ or "")
    return {re.sub(r"/(?=M/|M$)M|/L$|/S$|/K$", "/[^ ]+", re.sub("_Q$", "_[^ ]+", tag)) for tag in listed}


def the_right_half(batch: Any) -> Tensor:
    return torch.tensor([[4, 0, 8, 8]]).expand(len(batch[0]), 4)


@pytest.mark.parametrize("kind", CALLBACKS)
def test_exactly_the_documented_tags_appear(kind: type, tmp_path: Path) -> None:
    options = {InputAttribution: {"truth": the_right_half}, DataInfluence: {"retrain": lambda _: Net()}}.get(kind, {})
    fit, module, data = trainer(tmp_path, callbacks=[make(kind, **options)]), Net(), loaders()
    fit.fit(module, *data)
    fit.validate(module, data[1], verbose=False)
    fit.test(module, data[1], verbose=False)
    fit.logger.finalize("success")
    found = set().union(*tags_of(tmp_path).values()) - USERS
    patterns = {p for p in documented(kind) if not p.startswith("interp_errors")}
    assert len(patterns) >= 2
    for tag in found:
        assert any(re.fullmatch(pattern, tag) for pattern in patterns), f"{tag} is not documented"
    for pattern in patterns:
        assert any(re.fullmatch(pattern, tag) for tag in found), f"{pattern} is documented but absent"


class Rows(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Words(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(30, 8), nn.LSTM(8, 8, batch_first=True))
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.net(input_ids)[0][:, -1])

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch["input_ids"]), batch["label"])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("loss", self.training_step(batch, _))


def rows() -> DataLoader:
    x = torch.randn(40, 5)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 8)


def words() -> DataLoader:
    ids = torch.randint(0, 30, (40, 6))
    return DataLoader([{"input_ids": i, "label": i[0] % 2, "name": "text"} for i in ids], 8)


@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize("data", ["images", "rows", "words"])
def test_no_arguments_are_needed(kind: type, data: str, tmp_path: Path) -> None:
    module, train, val = {
        "images": lambda: (Net(), *loaders()),
        "rows": lambda: (Rows(), rows(), rows()),
        "words": lambda: (Words(), words(), words()),
    }[data]()
    trainer(tmp_path, callbacks=[kind()]).fit(module, train, val)
    assert list(tmp_path.rglob("interp/report.html"))


@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_failure_switches_the_callback_off_and_training_goes_on(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("broken on purpose")

    work = {RepresentationSimilarity: "_record", InputAttribution: "_evaluate", DataInfluence: "_end"}[kind]
    monkeypatch.setattr(kind, work, fail)
    fit = trainer(tmp_path, callbacks=[make(kind, on_error="warn")])
    with pytest.warns(UserWarning, match=rf"(?s){kind.__name__} is off.*broken on purpose") as caught:
        fit.fit(Net(), *loaders())
    assert len([w for w in caught if "is off for this run" in str(w.message)]) == 1
    assert fit.current_epoch == 2
    fit.logger.finalize("success")
    assert f"interp_errors/{kind.__name__}" in tags_of(tmp_path)["tensors"]
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        trainer(tmp_path, callbacks=[make(kind)]).fit(Net(), *loaders())


class NoBatch(Net):
    """Raises if a training batch is seen: configuration must have failed before."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("a batch was trained on")


class Bare(NoBatch):
    def forward(self, x: Tensor) -> Tensor:
        return {"nothing": 0}  # type: ignore[return-value]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize(
    ("callback", "says"),
    [
        (RepresentationSimilarity(layers=["conv9"]), r"'conv9' names no layer of NoBatch; did you mean conv"),
        (RepresentationSimilarity(layers=["accuracy"]), "layers that forward calls .* got accuracy"),
        (RepresentationSimilarity(probe=TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0))), "at least one sample"),
        (InputAttribution(probe=TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0))), "at least one sample"),
        (DataInfluence(train_dataset=TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0))), "at least one sample"),
    ],
)
def test_bad_configuration_fails_before_the_first_batch(callback: L.Callback, says: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        trainer(tmp_path, callbacks=[callback]).fit(NoBatch(), *loaders())


@pytest.mark.parametrize(
    ("make_it", "says"),
    [
        (lambda: RepresentationSimilarity(layers="conv1"), "list of names or patterns"),
        (lambda: RepresentationSimilarity(layers=[]), "at least one name"),
        (lambda: RepresentationSimilarity(measures=["CKA"]), "measures such as CKA"),
        (lambda: RepresentationSimilarity(measures=[]), "at least one measure"),
        (lambda: RepresentationSimilarity(samples=2), "whole number from 4, got 2"),
        (lambda: RepresentationSimilarity(maps="average"), "maps: expected one of flatten, pool, positions"),
        (lambda: RepresentationSimilarity(tokens="last"), "tokens: expected one of mean, cls, positions, flatten"),
        (lambda: RepresentationSimilarity(every_n_steps=0), r"every_n_steps=...\): expected a whole number from 1"),
        (lambda: RepresentationSimilarity(every_n_epochs=1, every_n_steps=9), "or every_n_epochs=, got both"),
        (lambda: RepresentationSimilarity(store="all"), '"compact" or "activations", got .all'),
        (lambda: RepresentationSimilarity(budget_mb=0), "expected a positive number, got 0"),
        (lambda: RepresentationSimilarity(measures=[CKA()], sketch=3), "sketch=.*whole number from 64, got 3"),
        (lambda: RepresentationSimilarity(on_error="ignore"), '"warn" or "raise"'),
        (lambda: InputAttribution(methods=["GradCAM"]), "attributors such as Saliency"),
        (lambda: InputAttribution(samples=0), "whole number from 1, got 0"),
        (lambda: DataInfluence(queries=0), "whole number from 1, got 0"),
        (lambda: DataInfluence(top=True), "whole number from 1, got True"),
        (lambda: DataInfluence(estimator="EKFAC"), "estimator such as InfluenceFunction"),
        (lambda: DataInfluence(budget_seconds=-1), "seconds above 0"),
    ],
)
def test_arguments_are_checked_at_once(make_it: Any, says: str, unchecked: None) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        make_it()


@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_model_that_the_default_task_cannot_read(kind: type, tmp_path: Path) -> None:
    class Trains(Bare):
        training_step = Net.training_step

        def forward(self, x: Tensor) -> Any:
            return super(Bare, self).forward(x) if self.training else {"nothing": 0}

    with pytest.warns(UserWarning, match=rf"{kind.__name__} is off.*its defaults do not fit.*pass task=") as caught:
        trainer(tmp_path, max_epochs=1, callbacks=[kind()]).fit(Trains(), *loaders())
    assert len([w for w in caught if "is off" in str(w.message)]) == 1
    for options in ({"on_error": "raise"}, {"task": Task(inputs=lambda batch: batch[0])}):
        with pytest.raises(ValueError, match=r"pass task=Task\(outputs=\.\.\.\)") as raised:
            trainer(tmp_path, callbacks=[kind(**options)]).fit(Bare(), *loaders())
        assert any(kind.__name__ in note for note in raised.value.__notes__)


class Transformer(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        self.head = nn.Linear(8, 2)

    def forward(self, attention_mask: Tensor, input_ids: Tensor) -> Any:
        states = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return SimpleNamespace(logits=self.head(states[:, 0]))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch["attention_mask"], batch["input_ids"]).logits, batch["label"])

    validation_step = training_step  # type: ignore[assignment]


class Bytes(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() / 255)


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv1.requires_grad_(False)
        self.conv2.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(self.conv2(self.conv1(x))).mean((2, 3))
        return self.head(x)


class Series(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(3, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2))


def sentences() -> DataLoader:
    def collate(rows: list[Any]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([r[0] for r in rows], batch_first=True)
        return {"attention_mask": (ids > 0).long(), "input_ids": ids, "label": torch.stack([r[1] for r in rows])}

    return DataLoader([(torch.arange(1, 3 + i % 9), torch.tensor(i % 2)) for i in range(24)], 4, collate_fn=collate)


def uint8() -> DataLoader:
    data = Shapes()
    return DataLoader(TensorDataset((data.images * 255).to(torch.uint8), data.labels), 8)


def series() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(24, 3, 40), torch.arange(24) % 2), 8)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # in Lightning's own validation
@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize(
    ("module", "data"), [(Transformer, sentences), (Bytes, uint8), (Series, series)], ids=["text", "uint8", "series"]
)
def test_less_usual_inputs(kind: type, module: Any, data: Any, tmp_path: Path) -> None:
    trainer(tmp_path, max_epochs=1, callbacks=[kind(on_error="raise")]).fit(module(), data(), data())
    assert list(tmp_path.rglob("interp/report.html"))


def test_a_model_without_any_gradient_to_its_input_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"InputAttribution is off.*outputs with a gradient"):
        trainer(tmp_path, max_epochs=1, callbacks=[InputAttribution()]).fit(Frozen(), *loaders())


class OneLogit(Net):
    """A single logit per sample, squeezed to `(n,)`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]), (batch[1] > 0).float())

    def validation_step(self, batch: Any, _: int) -> None:
        pass


class Dense(Net):
    """A mask for every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x)[:, :1]

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        pass


def labelled(targets: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(Shapes().images, targets), 8)


@pytest.mark.parametrize("kind", CALLBACKS)
def test_squeezed_and_dense_outputs(kind: type, tmp_path: Path) -> None:
    binary = labelled((Shapes().labels > 0).float())
    trainer(tmp_path / "one", max_epochs=1, callbacks=[make(kind)]).fit(OneLogit(), binary, binary)
    masks = labelled((Shapes().images > 0.5).float())
    trainer(tmp_path / "mask", max_epochs=1, callbacks=[make(kind)]).fit(Dense(), masks, masks)
    assert len(list(tmp_path.rglob("interp/report.html"))) == 2
    for picture in tmp_path.rglob("interp/**/*.png"):
        with Image.open(picture) as image:
            assert max(image.size) < 2000, picture


@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_given_probe_needs_no_validation(kind: type, tmp_path: Path) -> None:
    given = {"query_dataset" if kind is DataInfluence else "probe": Shapes(12, seed=1)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, max_epochs=1, callbacks=[make(kind, **given)]).fit(Net(), loaders()[0])
    assert not [w for w in caught if "training set" in str(w.message)]


DDP = """
import sys, torch, lightning as L
from pathlib import Path
from lightning_interp import DataInfluence, InputAttribution, RepresentationSimilarity
from tests.models import Net, Shapes, loaders, trainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    for how in sys.argv[2:]:
        layers = ["accuracy"] if how == "wrong" else None
        callbacks = [RepresentationSimilarity(layers, samples=8), InputAttribution(samples=2), DataInfluence(queries=2)]
        L.seed_everything(3)
        net = Net()
        fit = trainer(sys.argv[1], devices=2, strategy="ddp", callbacks=callbacks if how != "bare" else [])
        fit.fit(net, *loaders())
        torch.save(net.state_dict(), Path(sys.argv[1], f"{how}{fit.global_rank}.pt"))
"""


def test_two_ranks_train_the_same_and_fail_together(tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    root = str(Path(__file__).parents[2])

    def launch(*how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), str(tmp_path), *how]
        env = dict(os.environ, PYTHONPATH=root)
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)

    done = launch("bare", "watched")
    assert done.returncode == 0, done.stderr[-3000:]
    states = [torch.load(tmp_path / f"{how}{rank}.pt") for how in ("bare", "watched") for rank in (0, 1)]
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())
    assert len(list(tmp_path.rglob("interp/report.html"))) == 1
    failed = launch("wrong")
    assert failed.returncode != 0
    assert "RepresentationSimilarity failed on rank zero" in failed.stderr


def test_one_folder_without_a_logger(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=1, logger=False, callbacks=[make(kind) for kind in CALLBACKS])
    fit.fit(Net(), *loaders())
    assert len(list(tmp_path.rglob("report.html"))) == 2


def test_the_validation_set_is_found_before_its_loader_is_made(tmp_path: Path) -> None:
    options = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2}
    fit = trainer(tmp_path, callbacks=[RepresentationSimilarity(samples=8)], **options)
    fit.fit(Net(), *loaders())
    store = open_store(Folder(str(Path(fit.log_dir) / "interp" / "similarity")))
    assert store.manifest["probe"]["source"] == "validation set"


@pytest.mark.parametrize("kind", CALLBACKS)
def test_loggers(kind: type, tmp_path: Path) -> None:
    for name, logger in {
        "none": False,
        "csv": CSVLogger(tmp_path / "csv"),
        "two": [CSVLogger(tmp_path / "two"), TensorBoardLogger(tmp_path / "two")],
    }.items():
        trainer(tmp_path / name, callbacks=[make(kind)], logger=logger).fit(Net(), *loaders())
        assert list((tmp_path / name).rglob("interp/**/section.html")), name
    written = (tmp_path / "csv" / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert f"interp_seconds/{kind.__name__}" in written


@pytest.mark.parametrize("kind", CALLBACKS)
def test_fast_dev_run_works_and_writes_nothing(kind: type, tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[make(kind)], fast_dev_run=True).fit(Net(), *loaders())
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == []


@pytest.mark.parametrize("kind", CALLBACKS)
def test_without_validation_the_training_set_is_shown_and_it_is_said(kind: type, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="come from the training set"):
        trainer(tmp_path, callbacks=[make(kind)]).fit(Net(), loaders()[0])
    assert list(tmp_path.rglob("interp/report.html"))


class Stream(IterableDataset):
    """Augments by a generator of its own."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)

    def __iter__(self) -> Any:
        for image, label in (Shapes()[i] for i in range(24)):
            yield image + 0.1 * torch.randn(1, generator=self.random), label


@pytest.mark.parametrize("kind", CALLBACKS)
def test_streams(kind: type, tmp_path: Path) -> None:
    bare = Net()
    trainer(tmp_path / "bare").fit(bare, DataLoader(Stream(), 8))
    watched = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path / "watched", callbacks=[kind()]).fit(watched, DataLoader(Stream(), 8))
    assert all(torch.equal(a, b) for a, b in zip(bare.fed, watched.fed, strict=True))
    stream = DataLoader(Stream(), 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, callbacks=[make(kind)]).fit(Net(), stream, loaders()[1])
    said = [str(w.message) for w in caught if "is off for this run" in str(w.message)]
    val = DataLoader(Stream(), 8)
    trainer(tmp_path / "val", callbacks=[make(kind)]).fit(Net(), loaders()[0], val)
    assert list((tmp_path / "val").rglob("interp/report.html"))
    if kind is DataInfluence:
        assert len(said) == 1
        assert "have no indices; pass train_dataset=" in said[0]
    else:
        assert said == []
        assert list(tmp_path.rglob("interp/report.html"))


@pytest.mark.parametrize("kind", CALLBACKS)
def test_mixed_precision(kind: type, tmp_path: Path) -> None:
    options = {"measures": DEFAULT_MEASURES} if kind is RepresentationSimilarity else {}
    for precision in ("bf16-mixed", "64-true"):
        callback = make(kind, **options)
        trainer(tmp_path, callbacks=[callback], max_epochs=1, precision=precision).fit(Net(), *loaders())
    assert len(list(tmp_path.rglob("interp/report.html"))) == 2


@pytest.mark.parametrize("kind", CALLBACKS)
def test_sharded_strategies_are_declined(kind: type, tmp_path: Path) -> None:
    class FSDPLike(L.pytorch.strategies.SingleDeviceStrategy):
        pass

    with pytest.warns(UserWarning, match="FSDPLike shards the parameters"):
        trainer(tmp_path, callbacks=[make(kind)], strategy=FSDPLike("cpu"), accelerator="auto").fit(Net(), *loaders())


def test_all_three_live_together(tmp_path: Path) -> None:
    fit = trainer(tmp_path, callbacks=[make(kind) for kind in CALLBACKS])
    fit.fit(Net(), *loaders())
    report = next(tmp_path.rglob("interp/report.html")).read_text()
    headings = re.findall("<h2>(.*?)</h2>", report)
    assert headings == ["How the layers changed", "Where the network looks", "Which training samples made it so"]
    assert "http" not in report


def test_callbacks_that_differ_in_one_argument_have_keys_of_their_own() -> None:
    short, long = Shapes(8), Shapes(12)
    keys = [
        *(RepresentationSimilarity(probe=probe).state_key for probe in (None, short, long)),
        *(InputAttribution(probe=probe).state_key for probe in (None, short, long)),
        *(DataInfluence(query_dataset=dataset).state_key for dataset in (None, short, long)),
        *(DataInfluence(train_dataset=dataset).state_key for dataset in (short, long)),
        *(DataInfluence(weights="best").state_key, DataInfluence(retrain="last_layer").state_key),
        DataInfluence(retrain=make).state_key,
    ]
    assert len(set(keys)) == len(keys)
    assert DataInfluence(query_dataset=Shapes(8)).state_key in keys  # as a resumed run makes it


def test_the_keys_of_default_callbacks_stay_for_checkpoints_that_exist() -> None:
    assert DataInfluence().state_key == "DataInfluence{'queries': 6, 'top': 5, 'estimator': 'None'}"
    assert "'given': (False, False)" in InputAttribution().state_key
    assert "'probe': None" in RepresentationSimilarity().state_key
