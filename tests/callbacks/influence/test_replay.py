"""Influence from a checkpoint: what the callback would have written, by the command and in Python."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_interp import DataInfluence, Display
from lightning_interp.cli import main
from lightning_interp.influence import EKFAC, InfluenceFunction
from tests.models import Net, Shapes, loaders, trainer

HERE = __name__


ENDED: list[str] = []


class Ends(L.Callback):
    def on_train_end(self, *_: Any) -> None:
        ENDED.append("callback")


class Chosen(Net):
    """Made with hyperparameters, and with something of its own to do at the end of training."""

    def __init__(self, optimizer: str = "SGD", rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        extra = {"momentum": 0.9, "weight_decay": 0.01} if self.hparams["optimizer"] == "SGD" else {}
        optimizer = getattr(torch.optim, self.hparams["optimizer"])(self.parameters(), self.hparams["rate"], **extra)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def configure_callbacks(self) -> list[L.Callback]:
        return [Ends()]

    def on_train_end(self) -> None:
        ENDED.append("network")


class Corners(L.LightningDataModule):
    """Of as many samples as its hyperparameter says."""

    def __init__(self, n: int = 24) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader:
        return loaders(n=self.hparams["n"])[0]

    def val_dataloader(self) -> DataLoader:
        return loaders()[1]


class WithLoaders(Chosen):
    def train_dataloader(self) -> DataLoader:
        return loaders()[0]

    def val_dataloader(self) -> DataLoader:
        return loaders()[1]


class Wraps(Chosen):
    """Its hyperparameter is a network."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.save_hyperparameters()


class Needs(Net):
    """Its argument is not saved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(6, width)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(Shapes())


pair = (Shapes(), Shapes(12, seed=1))


def streams() -> tuple[DataLoader, DataLoader]:
    return DataLoader(Stream(), 8), DataLoader(Shapes(12), 6)


def wide() -> Needs:
    return Needs(5)


def trained(folder: Path, module: L.LightningModule, data: Any = None, **options: Any) -> tuple[Path, Path]:
    """Return a run's folder and its checkpoint."""
    kept = ModelCheckpoint(filename="kept", save_weights_only=options.pop("weights", False))
    callbacks = [*options.pop("callbacks", []), kept]
    fit = trainer(folder, callbacks=callbacks, enable_checkpointing=True, **options)
    fit.fit(module, **({"datamodule": data} if data else dict(zip(NAMES, loaders(), strict=True))))
    return Path(fit.log_dir), Path(kept.best_model_path)


NAMES = ("train_dataloaders", "val_dataloaders")


def files(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in (run / "interp").rglob("*") if file.is_file()}


def asked(*arguments: Any) -> int:
    return main(["influence", *map(str, arguments), "--device", "cpu"])


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_the_command_writes_what_the_callback_wrote(
    optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ENDED.clear()
    callback = DataInfluence(queries=2, top=3, on_error="raise")
    run, checkpoint = trained(tmp_path, Chosen(optimizer), Corners(30), callbacks=[callback])
    before, held = files(run), checkpoint.read_bytes()
    assert sorted(ENDED) == ["callback", "network"]
    assert {f"interp/influence/{name}" for name in ("influence.csv", "self_influence.csv")} < set(before)
    shutil.rmtree(run / "interp")
    code = asked(checkpoint, "--module", f"{HERE}:Chosen", "--data", f"{HERE}:Corners", "--queries", "2", "--top", "3")
    assert code == 0
    assert capsys.readouterr().out == f"The report is {run}/interp/influence/report.html, the tables lie beside it\n"
    assert files(run) == before
    assert f"{optimizer}" in before["interp/influence/report.html"].decode()
    assert checkpoint.read_bytes() == held
    assert len(ENDED) == 2


def test_events_go_to_the_run_at_the_checkpoints_step(tmp_path: Path) -> None:
    for weights in (False, True):
        run, checkpoint = trained(tmp_path / str(weights), Net(), weights=weights)
        assert asked(checkpoint, "--module", "tests.models:Net", "--data", "tests.models:loaders", "--queries", 1) == 0
        events = EventAccumulator(str(run), size_guidance={"images": 0, "tensors": 0, "scalars": 0}).Reload()
        images = {tag for tag in events.Tags()["images"] if tag.startswith("influence/")}
        assert len(images) == 2
        assert {event.step for tag in images for event in events.Images(tag)} == {6}
        assert [event.step for event in events.Scalars("interp_seconds/DataInfluence")] == [6]
        assert "influence_notes/summary/text_summary" in events.Tags()["tensors"]


def test_what_a_short_budget_left_out_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_interp.callbacks.influence.callback.SHORTEST_BUDGET", 1e-6)
    callback = DataInfluence(queries=1, budget_seconds=1e-6)
    with pytest.warns(UserWarning, match="40 of 96 training samples"):
        run, checkpoint = trained(tmp_path, Chosen(), Corners(96), callbacks=[callback])
    scores = run / "interp" / "influence" / "scores.safetensors"
    assert load_file(scores)["scores"].shape == (1, 40)
    assert asked(checkpoint, "--module", f"{HERE}:Chosen", "--data", f"{HERE}:Corners", "--queries", 1) == 0
    assert load_file(scores)["scores"].shape == (1, 96)
    limited = ("--queries", 1, "--budget", 1e-6)
    assert asked(checkpoint, "--module", f"{HERE}:Chosen", "--data", f"{HERE}:Corners", *limited) == 0
    assert load_file(scores)["scores"].shape == (1, 40)


@pytest.mark.parametrize("weights", [False, True])
def test_a_checkpoint_without_the_callback_says_so(
    weights: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [DataInfluence()] if weights else []
    run, checkpoint = trained(tmp_path, Net(), weights=weights, callbacks=callbacks, max_epochs=1)
    assert asked(checkpoint, "--module", "tests.models:Net", "--data", "tests.models:loaders") == 0
    assert "note: the checkpoint does not hold the learning rates that led to it" in capsys.readouterr().out
    report = (run / "interp" / "influence" / "report.html").read_text()
    assert "no step of an optimizer was recorded" in report
    assert "0.1 × the mean eigenvalue" in report
    assert "comes out too large" not in report


def test_a_checkpoint_inside_an_epoch_is_damped_by_its_own_steps(tmp_path: Path) -> None:
    kept = ModelCheckpoint(filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit = trainer(tmp_path, callbacks=[DataInfluence(queries=1), kept], enable_checkpointing=True)
    fit.fit(Net(), *loaders())
    early = Path(kept.dirpath or "") / "step=2.ckpt"
    written = DataInfluence(queries=1).explain(early, Net, loaders, out=tmp_path / "early", device="cpu")
    assert "over 2 steps" in Path(written).read_text()
    assert written == f"{tmp_path}/early/interp/influence/report.html"
    assert "over 6 steps" in (Path(fit.log_dir) / "interp" / "influence" / "report.html").read_text()


def test_named_queries_replace_the_earlier_report_whole(tmp_path: Path) -> None:
    run, checkpoint = trained(tmp_path, Net(), callbacks=[DataInfluence(queries=4)])
    folder = run / "interp" / "influence"
    assert len(list(folder.glob("query-*.png"))) == 4
    (folder / "mine.txt").write_text("kept")
    options = ("--query", "7,3", "--no-self-influence", "--check")
    assert asked(checkpoint, "--module", "tests.models:Net", "--data", "tests.models:loaders", *options) == 0
    assert {file.name for file in folder.iterdir()} == {
        "query-3.png",
        "query-7.png",
        "influence.csv",
        "report.html",
        "scores.safetensors",
        "section.html",
        "spot-check.png",
        "mine.txt",
    }
    with open(folder / "influence.csv", newline="") as file:
        assert {row["query_id"] for row in csv.DictReader(file)} == {"3", "7"}
    assert "over 6 steps" in (folder / "report.html").read_text()  # recorded under other arguments


def test_in_python_with_an_estimator_and_a_network_of_ones_own(tmp_path: Path) -> None:
    run, checkpoint = trained(tmp_path, Net(), callbacks=[DataInfluence()])
    estimator = InfluenceFunction(EKFAC(), damping=0.1)
    callback = DataInfluence(queries=3, estimator=estimator, display=Display(sample_id=lambda i: f"img-{i}"))
    module, state = Net(), dict(callback.state_dict())
    data = (Subset(Shapes(30), range(3, 27)), Shapes(12, seed=1))
    report = Path(callback.explain(checkpoint, module, data, query=[2, 5], out=tmp_path / "out", device="cpu"))
    assert callback.state_dict() == state
    assert callback.budget_seconds is None
    assert "configure_callbacks" not in vars(module)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
    with open(report.parent / "influence.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    order = list(dict.fromkeys(int(row["query_id"].removeprefix("img-")) for row in rows))
    assert sorted(order) == [2, 5]
    expected = estimator(module, data[0], Subset(data[1], order)).scores
    found = load_file(report.parent / "scores.safetensors")
    assert torch.allclose(found["scores"], expected, rtol=1e-3, atol=1e-7)
    assert found["train_index"].tolist() == list(range(3, 27))
    assert not (run / "interp" / "influence" / "query-img-2.png").exists()


def test_data_comes_in_every_form(tmp_path: Path) -> None:
    run, checkpoint = trained(tmp_path, WithLoaders("Adam"), Corners(24), callbacks=[DataInfluence(queries=1)])
    before = load_file(run / "interp" / "influence" / "scores.safetensors")["scores"]
    for data in (None, "Corners", "loaders", "pair"):
        given = () if data is None else ("--data", f"{HERE}:{data}")
        out = tmp_path / str(data)
        options = ("--out", out, "--queries", 1)
        assert asked(checkpoint, "--module", f"{HERE}:WithLoaders", *given, *options) == 0
        found = load_file(out / "interp" / "influence" / "scores.safetensors")["scores"]
        assert torch.allclose(found, before, rtol=1e-4, atol=1e-7), data  # a pair is read in batches of another size
    report = DataInfluence(queries=1).explain(checkpoint, WithLoaders, Corners(24), out=tmp_path / "dm", device="cpu")
    assert torch.equal(load_file(Path(report).parent / "scores.safetensors")["scores"], before)


def test_more_than_tensors_is_unpickled_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    run, checkpoint = trained(tmp_path, Wraps(nn.Linear(2, 2)), callbacks=[DataInfluence(queries=1)])
    arguments = (checkpoint, "--module", f"{HERE}:Wraps", "--data", f"{HERE}:loaders", "--queries", 1)
    before = files(run)
    assert asked(*arguments) == 2
    said = capsys.readouterr().err
    assert "torch.nn.modules.linear.Linear too" in said
    assert "--trust" in said
    assert asked(*arguments, "--trust") == 0
    assert files(run) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"CHECKPOINT": "nope.ckpt"}, "checkpoint: expected a file, found none at nope.ckpt"),
        ({"CHECKPOINT": __file__}, "is no file that torch.load can read"),
        ({"CHECKPOINT": "plain.pt"}, "checkpoint: expected a Lightning checkpoint, with a state_dict in it"),
        ({"--module": None}, "module: expected the network's class, got none"),
        ({"--module": "tests.models"}, "--module: expected package.module:Name, got 'tests.models'"),
        ({"--module": "tests.nowhere:Net"}, "--module: cannot import tests.nowhere (ModuleNotFoundError"),
        ({"--module": "tests.models:Nett"}, "--module: tests.models has no Nett"),
        ({"--module": "tests.models:Shapes"}, "module: expected a LightningModule, got the class Shapes"),
        ({"--module": "tests.models:loaders"}, "module: expected a LightningModule, got a tuple from loaders"),
        ({"--module": f"{HERE}:wide"}, "module: the checkpoint's weights do not fit Needs: size mismatch for head"),
        ({"--module": f"{HERE}:Needs"}, "module: Needs cannot be made with what the checkpoint holds"),
        ({"--data": None}, "data: expected the training data, got none, nor has Net a train_dataloader"),
        ({"--data": f"{HERE}:missing"}, "--data: tests.callbacks.influence.test_replay has no missing"),
        ({"--data": "tests.models:Shapes"}, "data: expected a LightningDataModule, got the class Shapes"),
        ({"--data": "tests.models:Net"}, "data: expected a LightningDataModule, got the class Net"),
        ({"--data": f"{HERE}:wide"}, "or a function that returns either, got a Needs"),
        ({"--data": f"{HERE}:streams"}, "data: the training samples have no indices"),
        ({"--query": "3,99"}, "query: expected dataset indices of the 12 validation samples (0, 1, 2, ...), got 99"),
        ({"--queries": "0"}, "DataInfluence(queries=...): expected a whole number from 1, got 0"),
        ({"--budget": "-1"}, "DataInfluence(budget_seconds=...): expected seconds above 0 or None, got -1.0"),
        ({"--device": "abacus"}, "device, precision: You selected an invalid accelerator name"),
        ({"--precision": "3"}, "device, precision: Precision '3' is invalid"),
    ],
)
def test_errors_are_one_line_and_name_the_argument(
    options: dict[str, str | None],
    says: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    torch.save({"weight": torch.zeros(2)}, "plain.pt")
    chosen = {"CHECKPOINT": str(checkpoint), "--module": "tests.models:Net", "--data": "tests.models:loaders"} | options
    first = chosen.pop("CHECKPOINT")
    device = {} if "--device" in chosen else {"--device": "cpu"}
    given = [part for name, value in (chosen | device).items() if value is not None for part in (name, value)]
    assert main(["influence", str(first), *given]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("lightning-interp: ")
    assert said.err.count("\n") == 1
    assert says in said.err
    assert said.out == ""
    assert not (checkpoint.parents[1] / "interp").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"), Net(), max_epochs=1)[1]


def test_modules_are_found_in_the_current_directory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_project_of_a_test.py").write_text(
        "from tests.models import Net, loaders\n\n\nclass Mine:\n    net, data = Net, staticmethod(loaders)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [place for place in __import__("sys").path if place])
    shutil.copy(checkpoint, tmp_path / "alone.ckpt")
    mine = "my_project_of_a_test:Mine"
    assert asked("alone.ckpt", "--module", f"{mine}.net", "--data", f"{mine}.data", "--queries", 1) == 0
    assert (tmp_path / "interp" / "influence" / "report.html").exists()
