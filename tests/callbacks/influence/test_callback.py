"""What the influence callback asks, scores and writes."""

from __future__ import annotations

import csv
import math
import re
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_interp import DataInfluence, Display, Task
from lightning_interp.callbacks.influence.budget import afford_curvature, afford_scores
from lightning_interp.callbacks.influence.queries import strangeness
from lightning_interp.callbacks.influence.report import INFLUENCE_TITLE
from lightning_interp.data.samples import Samples
from lightning_interp.influence import (
    EKFAC,
    KFAC,
    ConjugateGradient,
    GaussNewton,
    IdentityCurvature,
    InfluenceFunction,
    LiSSA,
)
from lightning_interp.influence.curvature import Curvature
from lightning_interp.influence.curvature.ekfac import FittedEKFAC
from lightning_interp.influence.estimators.fitted import FittedInfluence
from lightning_interp.influence.estimators.influence_function import find_coverage
from lightning_interp.influence.estimators.prepared import PreparedInfluence
from lightning_interp.influence.gradients.reader import Reader
from tests.models import Net, Shapes, loaders, trainer


def written(fit: L.Trainer) -> tuple[list[dict[str, str]], dict[str, Tensor], str]:
    folder = Path(fit.log_dir) / "interp" / "influence"
    with open(folder / "influence.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, load_file(folder / "scores.safetensors"), (folder / "report.html").read_text()


def events(fit: L.Trainer) -> EventAccumulator:
    return EventAccumulator(str(fit.log_dir), {"images": 0}).Reload()


def test_the_table_says_what_the_estimator_says(tmp_path: Path) -> None:
    module = Net()
    train, val = loaders()
    estimator = InfluenceFunction(EKFAC(), damping=0.1)
    fit = trainer(tmp_path, callbacks=[DataInfluence(queries=3, estimator=estimator, on_error="raise")])
    fit.fit(module, train, val)
    rows, scores, report = written(fit)
    queries = list(dict.fromkeys(row["query_id"] for row in rows))
    assert len(queries) == 3
    expected = estimator(module, train.dataset, Subset(val.dataset, [int(q) for q in queries])).scores
    assert torch.allclose(scores["scores"], expected, rtol=1e-3, atol=1e-7)
    assert scores["train_index"].tolist() == list(range(24))
    for row in rows:
        score = float(expected[queries.index(row["query_id"]), int(row["train_index"])])
        assert float(row["score"]) == pytest.approx(score, rel=1e-2)
        assert (score < 0) == (row["list"] == "harmful")
        assert row["train_label"] == str(int(train.dataset[int(row["train_index"])][1]))
        if row["list"] == "surprisingly helpful":
            assert row["train_label"] != row["query_label"]
    for heading in (
        "Helpful",
        "Harmful",
        "Surprisingly helpful",
        "EKFAC(columns=2048",
    ):
        assert heading in report


def test_the_runs_own_damping_is_the_default(tmp_path: Path) -> None:
    module = Net()
    fit = trainer(tmp_path, callbacks=[DataInfluence(queries=2, on_error="raise")])
    fit.fit(module, *loaders())
    _, scores, report = written(fit)
    assert "GaussNewton was chosen" in report
    assert "over 6 steps" in report
    recorded = fit.callbacks[0]._recorder.finish(fit, module).damping()
    whole = InfluenceFunction(GaussNewton(columns=1024), damping=recorded)
    queries = [int(row["query_id"]) for row in written(fit)[0]]
    expected = whole(module, loaders()[0].dataset, Subset(loaders()[1].dataset, list(dict.fromkeys(queries))))
    error = (scores["scores"] - expected.scores).abs().max()  # batches of another size round otherwise
    assert float(error) < 1e-3 * float(expected.scores.abs().max())


class Forgets(Net):
    """Its first epoch is its best by what it logs."""

    def on_train_epoch_end(self) -> None:
        self.log("score", float(self.current_epoch))
        self.reached = {name: value.clone() for name, value in self.state_dict().items()}


def test_the_best_weights_are_explained_and_the_last_put_back(tmp_path: Path) -> None:
    estimator = InfluenceFunction(EKFAC(), damping=0.1)
    kept = ModelCheckpoint(tmp_path / "kept", monitor="score", mode="min", save_top_k=1)
    callback = DataInfluence(queries=2, weights="best", estimator=estimator, on_error="raise")
    fit, module = trainer(tmp_path, callbacks=[callback, kept], enable_checkpointing=True), Forgets()
    fit.fit(module, *loaders())
    rows, scores, _ = written(fit)
    last = {name: value.clone() for name, value in module.state_dict().items()}
    best = torch.load(kept.best_model_path, weights_only=True)["state_dict"]
    assert any(not torch.equal(last[name], best[name]) for name in last)
    module.load_state_dict(best)
    queries = list(dict.fromkeys(int(row["query_id"]) for row in rows))
    expected = estimator(module, loaders()[0].dataset, Subset(loaders()[1].dataset, queries)).scores
    assert torch.allclose(scores["scores"], expected, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(value, last[name]) for name, value in module.reached.items())


def test_best_without_a_checkpoint_is_the_last_and_said(tmp_path: Path) -> None:
    options = {"max_epochs": 1, "enable_checkpointing": False}
    fit = trainer(tmp_path, callbacks=[DataInfluence(queries=1, weights="best")], **options)
    with pytest.warns(UserWarning, match="no checkpoint callback has a best model"):
        fit.fit(Net(), *loaders())
    with pytest.raises(ValueError, match='expected "last" or "best", got \'first\''):
        DataInfluence(weights="first")  # type: ignore[arg-type]


def test_suspects_and_spot_checks_are_written(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def retrain(indices: Sequence[int]) -> Net:
        asked.append(list(indices))
        return Net()

    fit = trainer(tmp_path, callbacks=[DataInfluence(queries=2, retrain=retrain, on_error="raise")])
    fit.fit(Net(), *loaders())
    folder = Path(fit.log_dir) / "interp" / "influence"
    with open(folder / "self_influence.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["rank"]) for row in rows] == list(range(1, 25))
    assert (folder / "look-at-first.png").exists()
    assert (folder / "spot-check.png").exists()
    assert asked[0] == list(range(24))
    assert all(len(indices) == 23 for indices in asked[1:])
    assert 2 <= len(asked) <= 5


def test_the_last_layer_checks_the_scores(tmp_path: Path) -> None:
    def spots(fit: L.Trainer) -> list[tuple[float, float]]:
        text = (Path(fit.log_dir) / "interp" / "influence" / "report.html").read_text()
        table = text.partition('<table class="spots">')[2].partition("</table>")[0]
        cells = [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
        return [(float(predicted), float(actual)) for _, _, predicted, actual in cells]

    torch.manual_seed(0)
    one = InfluenceFunction(GaussNewton(), layers=["head"])
    fit = trainer(tmp_path, callbacks=[DataInfluence(queries=4, retrain="last_layer", estimator=one, on_error="raise")])
    fit.fit(Net(), *loaders())
    predicted, actual = zip(*spots(fit), strict=True)
    assert len(predicted) >= 5
    assert statistics.correlation(predicted, actual) > 0.99
    text = (Path(fit.log_dir) / "interp" / "influence" / "report.html").read_text()
    assert "Checked by retraining the last layer alone" in text
    r = statistics.correlation(predicted, actual)
    assert f"a correlation of {r:.2f} in {len(predicted)} checks by retraining of the last layer alone" in text


def test_a_check_that_fails_loses_no_score(tmp_path: Path) -> None:
    def broken(_: Sequence[int]) -> Net:
        raise RuntimeError("no room")

    fit = trainer(tmp_path, callbacks=[DataInfluence(queries=1, retrain=broken)])
    with pytest.warns(UserWarning, match=r"(?s)scores stand unchecked.*no room"):
        fit.fit(Net(), *loaders())
    assert (Path(fit.log_dir) / "interp" / "influence" / "report.html").exists()
    assert not (Path(fit.log_dir) / "interp" / "influence" / "spot-check.png").exists()
    fit = trainer(tmp_path, callbacks=[DataInfluence(queries=1, retrain=broken, on_error="raise")])
    with pytest.raises(RuntimeError, match="no room"):
        fit.fit(Net(), *loaders())


class Probable(Net):
    """Gives log-probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log_softmax(-1)


def test_a_last_layer_that_cannot_be_retrained_stops_before_the_first_batch(tmp_path: Path) -> None:
    net = Probable()
    fit = trainer(tmp_path, callbacks=[DataInfluence(retrain="last_layer")])
    with pytest.raises(
        ValueError, match=r'DataInfluence\(retrain="last_layer"\): model: .* Probable .* changed behind it'
    ):
        fit.fit(net, *loaders())
    assert not net.fed
    with pytest.raises(TypeError, match=r"or a function from dataset indices .*, got 'all'"):
        DataInfluence(retrain="all")  # type: ignore[arg-type]


def test_the_most_confidently_wrong_come_first() -> None:
    outputs = torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.0, 4.0], [0.1, 0.0]])
    targets = torch.tensor([0, 0, 0, 0])
    losses = F.cross_entropy(outputs, targets, reduction="none")
    order = strangeness(Task(), outputs, targets, losses).argsort(descending=True)
    assert order.tolist() == [2, 1, 3, 0]


def test_augmentation_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="returns other inputs each time it is read"):
        trainer(tmp_path, callbacks=[DataInfluence()]).fit(Net(), *loaders(augment=True))
    fit = trainer(tmp_path, callbacks=[DataInfluence(train_dataset=Shapes(24))])
    fit.fit(Net(), *loaders(augment=True))
    assert "augmentation" not in written(fit)[2]


class Listed(Net):
    """Takes a list of images, as detectors do."""

    def forward(self, x: Any) -> Tensor:
        return super().forward(torch.stack(list(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def listed(rows: list[Any]) -> tuple[list[Tensor], Tensor]:
    return [image for image, _ in rows], torch.stack([label for _, label in rows])


def test_lists_of_images_of_one_size_are_one_input(tmp_path: Path) -> None:
    found = []
    for module, collate in ((Listed, listed), (Net, None)):
        L.seed_everything(0, verbose=False)
        train, val = (DataLoader(Shapes(24, seed=seed), 8, collate_fn=collate) for seed in (0, 1))
        fit = trainer(tmp_path, max_epochs=1, callbacks=[DataInfluence(queries=2, on_error="raise")])
        fit.fit(module(), train, val)
        found.append(written(fit)[1]["scores"])
    assert torch.allclose(*found, rtol=1e-4, atol=1e-7)


class OneByOne(Net):
    """Takes a list of images, each of its own size."""

    def forward(self, x: Any) -> Tensor:
        return torch.cat([super(OneByOne, self).forward(image[None]) for image in x])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing to log."""


@pytest.mark.parametrize("sizes", [(6, 8), (8, 8)])
def test_a_query_among_the_training_images_of_a_list_is_found(sizes: tuple[int, int], tmp_path: Path) -> None:
    images = [(image[:, : sizes[i % 2]], label) for i, (image, label) in enumerate(Shapes(8))]
    fit = trainer(tmp_path, max_epochs=1, callbacks=[DataInfluence(queries=2, on_error="raise")])
    fit.fit(OneByOne(), DataLoader(images, 4, collate_fn=listed), DataLoader(images[3:5], 2, collate_fn=listed))
    pairs = re.findall(r"query #(\d) is identical to training sample #(\d)", written(fit)[2])
    assert sorted(pairs) == [("0", "3"), ("1", "4")]


class Weighted(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], weight=torch.tensor([1.0, 5.0, 9.0]))


def test_another_loss_than_the_training_steps_is_said(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=1, callbacks=[DataInfluence()])
    with pytest.warns(UserWarning, match="is not the one of training_step"):
        fit.fit(Weighted(), *loaders())
    verdict = written(fit)[2].split("How far to trust it: ")[1].split("</p>")[0]
    assert verdict.startswith("doubtful")
    assert "is not the one of training_step" in verdict
    weights = torch.tensor([1.0, 5.0, 9.0])
    task = Task(loss=lambda o, t: F.cross_entropy(o, t, weight=weights, reduction="none") / weights[t].mean())
    fit = trainer(tmp_path, max_epochs=1, callbacks=[DataInfluence(task=task)])
    fit.fit(Weighted(), *loaders())
    assert "is not the one" not in written(fit)[2]


@pytest.mark.filterwarnings("ignore:.*[Ss]wapping.*")
def test_weights_that_are_averaged_later_are_said(tmp_path: Path) -> None:
    average = L.pytorch.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    with pytest.warns(UserWarning, match=r"before StochasticWeightAveraging averages them; list DataInfluence after"):
        trainer(tmp_path, callbacks=[DataInfluence(), average]).fit(Net(), *loaders())
    fit = trainer(tmp_path, callbacks=[average, DataInfluence()])
    fit.fit(Net(), *loaders())
    assert "averages" not in written(fit)[2]


def test_steps_that_nobody_recorded_are_said(tmp_path: Path) -> None:
    checkpoints: tuple[list[L.Callback], ...] = [], [DataInfluence(queries=2)]
    for place, callbacks in enumerate(checkpoints):
        first = trainer(tmp_path / str(place), max_epochs=1, callbacks=callbacks)
        first.fit(Net(), *loaders())
        first.save_checkpoint(tmp_path / f"{place}.ckpt")
    with pytest.warns(UserWarning, match="the first 3 steps were trained without this callback"):
        trainer(tmp_path, callbacks=[DataInfluence(queries=2)]).fit(Net(), *loaders(), ckpt_path=tmp_path / "0.ckpt")
    fit = trainer(tmp_path, callbacks=[DataInfluence(queries=2)])
    fit.fit(Net(), *loaders(), ckpt_path=tmp_path / "1.ckpt")
    assert "without this callback" not in written(fit)[2]


def test_a_subset_shows_the_original_index(tmp_path: Path) -> None:
    train = DataLoader(Subset(Shapes(30), list(range(6, 30))), 8, shuffle=True)
    fit = trainer(tmp_path, callbacks=[DataInfluence(display=Display(sample_id=lambda i: f"img-{i}"))])
    fit.fit(Net(), train, loaders()[1])
    rows, scores, _ = written(fit)
    assert scores["train_index"].tolist() == list(range(6, 30))
    assert all(row["train_id"] == f"img-{row['train_index']}" for row in rows)


def test_private_inputs_stay_out_of_the_report(tmp_path: Path) -> None:
    reports = []
    for seed in (0, 1):
        val = DataLoader(Shapes(12, seed=seed), 6)
        fit = trainer(tmp_path / str(seed), callbacks=[DataInfluence(queries=1, display=Display(show_inputs=False))])
        fit.fit(Net(), loaders()[0], val)
        reports.append({part.split('"')[0] for part in written(fit)[2].split("data:image/png;base64,")[1:]})
    assert reports[0] == reports[1]
    assert len(reports[0]) <= 2


def test_the_budget_cuts_evenly_and_says_so(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=1, callbacks=[DataInfluence(budget_seconds=1e-6)])
    with pytest.warns(UserWarning, match=r"40 of 96 training samples, evenly spread, fit into 0 s"):
        fit.fit(Net(), *loaders(n=96))
    _, scores, report = written(fit)
    indices = scores["train_index"].tolist()
    assert (len(indices), indices[0], indices[-1]) == (40, 0, 95)
    assert "40 of 96 training samples were scored" in report
    assert "samples=40" in report
    assert " was chosen: " in report


def test_the_budget_leaves_small_work_alone() -> None:
    train, estimator = Samples(Shapes(96)), InfluenceFunction(EKFAC())
    for seconds in (math.inf, 1e6):
        prepared, message = afford_curvature(estimator, partial(prepare, Net(), train), seconds)
        assert (prepared.curvature, len(prepared.train), message) == (estimator.curvature, 96, "")
        assert prepared.coverage.left_out == {}
        assert afford_scores(len, train, seconds) is None


@dataclass(frozen=True)
class CountedEKFAC(EKFAC):
    sizes: list[int] = field(default_factory=list)

    def fit(self, reader: Reader, samples: Samples) -> FittedEKFAC:
        self.sizes.append(len(samples))
        return super().fit(reader, samples)


@pytest.mark.parametrize(("seconds", "sizes"), [(300.0, [40, 96]), (math.inf, [96])])
def test_coverage_is_searched_once_after_training_and_the_curvature_fitted_once_after_its_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, sizes: list[int]
) -> None:
    searched, curvature = [], CountedEKFAC()

    def counted(*args: Any) -> Any:
        searched.append(args)
        return find_coverage(*args)

    monkeypatch.setattr("lightning_interp.influence.estimators.influence_function.find_coverage", counted)
    callback = DataInfluence(estimator=InfluenceFunction(curvature), budget_seconds=seconds, on_error="raise")
    fit = trainer(tmp_path, max_epochs=1, callbacks=[callback])
    fit.fit(Net(), *loaders(n=96))
    assert (len(searched), curvature.sizes) == (2, sizes)  # once before training, to refuse what cannot work


def prepare(module: nn.Module, train: Samples, estimator: InfluenceFunction) -> PreparedInfluence:
    return estimator.prepare(module, train)


class Clock:
    """Goes a millisecond further at each look, and by what a test says, however busy the machine is."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        self.seconds += 1e-3
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("budget", "scoring"):
        monkeypatch.setattr(f"lightning_interp.callbacks.influence.{module}.time", clock)
    return clock


def test_scores_are_cut_to_what_fits(clock: Clock) -> None:
    data = Samples(range(2000))
    places = afford_scores(lambda some: 0.3 + 0.01 * len(some), data, 2.0)
    assert places is not None
    assert len(places) == pytest.approx(200, abs=5)
    assert (places[0], places[-1]) == (0, 1999)
    assert afford_scores(lambda some: 0.2, data, 2.0) is None  # a cost that does not grow by the sample


def test_what_does_not_grow_with_the_samples_is_no_cost_of_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    scored, timed = FittedInfluence.__call__, []

    def slow(self: FittedInfluence, *args: Any, **options: Any) -> Any:
        clock.seconds += 3.0
        return scored(self, *args, **options)

    def tried(score: Any, *_: Any) -> None:
        monkeypatch.setattr(FittedInfluence, "__call__", slow)
        timed.append(score([0, 1]))
        monkeypatch.setattr(FittedInfluence, "__call__", scored)

    monkeypatch.setattr("lightning_interp.callbacks.influence.scoring.afford_scores", tried)
    fit = trainer(tmp_path, max_epochs=1, callbacks=[DataInfluence(queries=1, on_error="raise")])
    fit.fit(Net(), *loaders())
    assert 0 < timed[0] < 2


@pytest.mark.parametrize("curvature", [ConjugateGradient(iterations=2), LiSSA(iterations=20)])
def test_curvatures_without_self_influence_leave_it_out(tmp_path: Path, curvature: Any) -> None:
    estimator = InfluenceFunction(curvature, damping=1.0)
    fit = trainer(tmp_path, max_epochs=1, callbacks=[DataInfluence(queries=1, estimator=estimator, on_error="raise")])
    fit.fit(Net(), *loaders())
    assert "residual" in written(fit)[2]
    assert not list(tmp_path.rglob("self_influence.csv"))


@pytest.mark.parametrize(
    "curvature", [IdentityCurvature(), LiSSA(iterations=3), ConjugateGradient(iterations=2), KFAC(), GaussNewton(96)]
)
def test_every_curvature_has_an_answer_in_a_short_time(curvature: Curvature, tmp_path: Path) -> None:
    estimator = InfluenceFunction(curvature, damping=0.1)
    callback = DataInfluence(queries=2, estimator=estimator, budget_seconds=1e-6, on_error="raise")
    fit = trainer(tmp_path, max_epochs=1, callbacks=[callback])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fit into 0 s.*")
        fit.fit(Net(), *loaders(n=96))
    iterates = isinstance(curvature, (LiSSA, ConjugateGradient))
    assert written(fit)[1]["scores"].shape == (2, 96 if iterates else 40)
    assert ("self-influence is left out" in written(fit)[2]) == iterates
    assert (Path(fit.log_dir) / "interp" / "influence" / "self_influence.csv").exists() != iterates


class Regression(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.mse_loss(self(batch[0]), batch[1]))


def test_regression_has_no_surprising_class(tmp_path: Path) -> None:
    data = TensorDataset(Shapes().images, torch.randn(24, 1))
    fit = trainer(tmp_path, callbacks=[DataInfluence(on_error="raise")])
    fit.fit(Regression(), DataLoader(data, 8), DataLoader(data, 8))
    assert {row["list"] for row in written(fit)[0]} == {"helpful", "harmful"}


@pytest.mark.filterwarnings("ignore:.*is not the one of training_step.*")
def test_binary_floats_with_names_are_not_called_wrong(tmp_path: Path) -> None:
    data = TensorDataset(Shapes().images, (torch.arange(24) % 2).float()[:, None])
    display = Display(class_names=["off", "on"])
    fit = trainer(tmp_path, callbacks=[DataInfluence(display=display, task=Task(kind="binary"), on_error="raise")])
    fit.fit(Regression(), DataLoader(data, 8), DataLoader(data, 8))
    rows, _, report = written(fit)
    assert {row["query_label"] for row in rows} | {row["query_prediction"] for row in rows} <= {"off", "on"}
    wrong = {row["query_id"] for row in rows if row["query_label"] != row["query_prediction"]}
    shown = report.split('class="query"')[1:]
    assert len(shown) == 6
    for part in shown:
        query = part.split("query #")[1].split("<")[0]
        assert ('class="wrong">predicted' in part.split("</figure>")[0]) == (query in wrong)


def test_a_decomposition_that_takes_too_long_leaves_the_last_layer() -> None:
    module, train, query = Net().eval(), Samples(Shapes(96)), Samples(Shapes(2))
    prepared, message = afford_curvature(InfluenceFunction(), partial(prepare, module, train), 1e-7)
    assert list(prepared.coverage.parameter_sizes) == ["head.weight", "head.bias"]
    assert "only the parameters of head" in message
    _, message = afford_curvature(InfluenceFunction(damping=0.1), partial(prepare, module, train), 1e-7)
    assert message == ""  # columns were chosen, which decompose no layer
    assert InfluenceFunction(layers=["head"])(module, train, query).covered == ("head.weight", "head.bias")


class MeanOfEmbeddings(nn.Module):
    """Has no linear or convolutional layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens).mean(1)


def test_a_network_without_a_last_layer_to_cut_to_is_not_cut() -> None:
    torch.manual_seed(0)
    train = Samples(TensorDataset(torch.randint(9, (60, 4)), torch.arange(60) % 3))
    prepared, message = afford_curvature(InfluenceFunction(EKFAC()), partial(prepare, MeanOfEmbeddings(), train), 1e-7)
    assert (list(prepared.coverage.parameter_sizes), message) == (["embedding.weight"], "")
    assert prepared.curvature == EKFAC(samples=40)


class SecondRank:
    """A rank that hears from rank zero what to cut."""

    index, count = 1, 2

    def __init__(self, *of_rank_zero: Any) -> None:
        self.of_rank_zero = list(of_rank_zero)

    def gather(self, value: Any) -> list[Any]:
        return [self.of_rank_zero.pop(0), value]

    def failed(self, why: str) -> None:
        raise AssertionError(why)


def test_rank_zero_decides_what_is_cut() -> None:
    train, ranks = Samples(Shapes(96)), SecondRank("head", 50)
    prepared, message = afford_curvature(InfluenceFunction(EKFAC()), partial(prepare, Net(), train), 1e6, ranks)
    assert list(prepared.coverage.parameter_sizes) == ["head.weight", "head.bias"]
    assert prepared.curvature == EKFAC(samples=50)
    assert "only the parameters of head" in message
    assert ranks.of_rank_zero == []


def test_an_estimator_that_cannot_work_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_interp.influence.curvature.gauss_newton.MOST_PARAMETERS_FOR_MATRIX", 50)
    for estimator, says in (
        (InfluenceFunction(layers=["nope"]), "'nope' names no layer"),
        (InfluenceFunction(GaussNewton()), "at most 50 covered"),
    ):
        with pytest.raises(ValueError, match=says):
            trainer(tmp_path, callbacks=[DataInfluence(estimator=estimator)]).fit(Net(), *loaders())


def test_the_budget_of_a_run_resumed_inside_an_epoch_is_no_uptime(tmp_path: Path) -> None:
    callback = DataInfluence()
    fit = trainer(tmp_path, max_epochs=1, callbacks=[callback])
    callback.on_train_epoch_start = lambda *_: None  # type: ignore[method-assign]  # as Lightning then leaves it out
    fit.fit(Net(), *loaders())
    assert callback._epoch_seconds[0] < 60


def test_two_callbacks_of_this_kind_keep_apart(tmp_path: Path) -> None:
    queries = [[0, 1], [2, 3, 4]]
    callbacks = [
        DataInfluence(queries=len(ids), query_dataset=Subset(Shapes(12, seed=1), ids), on_error="raise")
        for ids in queries
    ]
    fit = trainer(tmp_path, max_epochs=1, callbacks=callbacks)
    fit.fit(Net(), *loaders())
    folder, log = Path(fit.log_dir) / "interp", events(fit)
    for room, ids in zip(("influence", "influence-2"), queries, strict=True):
        with open(folder / room / "influence.csv", newline="") as file:
            assert {int(row["query_id"]) for row in csv.DictReader(file)} == set(ids)
        pictures = sorted(path.name for path in (folder / room).glob("query-*.png"))
        assert pictures == [f"query-{index}.png" for index in ids]
        assert sorted(tag for tag in log.Tags()["images"] if tag.startswith(f"{room}/query_")) == [
            f"{room}/query_{index}" for index in ids
        ]
        assert f"{room}/look_at_first" in log.Tags()["images"]
        assert log.Tensors(f"{room}_notes/summary/text_summary")
        assert len(load_file(folder / room / "scores.safetensors")["scores"]) == len(ids)
        report = (folder / room / "report.html").read_text()
        assert sorted(re.findall(r"<b>query #(\d+)</b>", report)) == [str(index) for index in ids]
        assert log.Scalars(f"interp_seconds/DataInfluence{room.removeprefix('influence')}")
    page = (folder / "report.html").read_text()
    assert [page.count(f"<b>query #{index}</b>") for index in range(6)] == [1, 1, 1, 1, 1, 0]
    assert re.findall("<h2>(.*?)</h2>", page) == [INFLUENCE_TITLE, f"{INFLUENCE_TITLE} (influence-2)"]
