"""What a reader sees of influence: the right samples, as what they are, and the ones to look at first."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_interp import Display, Task
from lightning_interp.callbacks.influence.report import (
    InfluenceReport,
    describe_influence,
    draw_card,
    draw_suspects,
    influence_findings,
    summary,
)
from lightning_interp.data.samples import Samples
from lightning_interp.influence.results import Influence, SelfInfluence, SpotCheck
from lightning_interp.views.report import render_section
from lightning_interp.views.sample import NEGATIVE

CLASSES = Task(kind="classes")


def scored(scores: Tensor, train: Samples, targets: Tensor, queries: Tensor, **fields: Any) -> Influence:
    """Return a record of scores, the columns those of `train`."""
    known = {
        "scores": scores,
        "train_ids": torch.tensor(train.ids),
        "train_targets": targets,
        "query_targets": queries,
        "query_losses": torch.full((len(scores),), 0.25),
        "method": "influence function",
        "damping": 0.01,
        "covered": ("weight",),
        "left_out": {},
        "covered_elements": 10,
        "gradient_norm": 0.0,
        "curvature_n": len(targets),
    }
    return Influence(**known | fields)


def suspected(train: Samples, targets: Tensor, suggested: Tensor | None) -> SelfInfluence:
    n = len(targets)
    scores = torch.linspace(1, 2, n).roll(n // 3)
    chance = torch.full((n,), torch.nan) if suggested is None else torch.linspace(0, 1, n)
    return SelfInfluence(scores, torch.tensor(train.ids), targets, torch.linspace(0.1, 0.9, n), suggested, chance)


def section_of(told: InfluenceReport) -> str:
    return render_section(influence_findings(told, 1).section)


def file_of(told: InfluenceReport, name: str) -> str:
    return str(influence_findings(told, 1).files[name])


def gallery_of(told: InfluenceReport, query: str) -> Any:
    return draw_card(next(card for card in told.cards if card.view.id == query), told.display)


class Fixed(nn.Module):
    """Answers with the class that a sample's first number names; of a table the first number itself."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Any) -> Tensor:
        first = torch.stack([sample.flatten()[0] for sample in x]).round().long()
        return 4 * nn.functional.one_hot(first.clamp(0, self.classes - 1), self.classes).float()


def images(n: int = 30, wrong: Sequence[int] = (3,)) -> tuple[Samples, Tensor]:
    """Return images whose first pixel is their label, but for the wrong ones, where it is the next label."""
    x, y = torch.rand(n, 1, 6, 6), torch.arange(n) % 3
    x[:, 0, 0, 0] = y.float()
    for place in wrong:
        x[place, 0, 0, 0] = float((y[place] + 1) % 3)
    return Samples(TensorDataset(x, y), batch_size=7), y


def told_of_images(display: Display | None = None, top: int = 2, **more: Any) -> tuple[InfluenceReport, Samples]:
    train, y = images()
    query, labels = images(2, wrong=[1])
    found = scored(torch.randn(2, 30), train, y, labels, agreement={"3 × the damping": 0.9})
    told = describe_influence(
        Fixed(), CLASSES, found, train, query, top, display or Display(), suspected(train, y, _answers(train)), **more
    )
    return told, train


def _answers(train: Samples) -> Tensor:
    return torch.cat([Fixed()(x).argmax(1) for x, _ in train])


def test_columns_find_their_samples_in_the_whole_training_set() -> None:
    whole, y = images()
    subset = Samples(Subset(whole.dataset, list(range(5, 30))), batch_size=4)
    places = torch.tensor([2, 9, 17, 24])
    found = scored(
        torch.tensor([[0.1, -0.2, 0.3, -0.4]]),
        subset.at(places.tolist()),
        y[places + 5],
        y[:1],
        places=places,
        scored=25,
    )
    told = describe_influence(Fixed(), CLASSES, found, subset, whole.at([0]), 2, Display())
    helpful, harmful, _ = told.cards[0].lists
    assert [held.view.id for held in helpful.samples] == ["22", "7"]
    assert [held.view.id for held in harmful.samples] == ["29", "14"]
    for held in (*helpful.samples, *harmful.samples):
        assert torch.equal(held.view.value, whole.dataset[int(held.view.id)][0])
    assert "<td>25</td>" in section_of(told)
    outside = scored(torch.ones(1, 4), whole.at([0, 1, 2, 7]), y[[0, 1, 2, 7]], y[:1])
    with pytest.raises(ValueError, match="expected indices of the training set, got 0, 1, 2"):
        describe_influence(Fixed(), CLASSES, outside, subset, whole.at([0]), 4, Display())


def test_the_samples_to_look_at_first() -> None:
    told, train = told_of_images(Display(class_names=["cat", "dog", "elk"], sample_id=lambda i: f"img-{i}"))
    held = suspected(train, torch.arange(30) % 3, None).scores
    rows = list(csv.DictReader(io.StringIO(file_of(told, "self_influence.csv"))))
    order = held.argsort(descending=True).tolist()
    assert [int(row["train_index"]) for row in rows] == order
    assert [int(row["rank"]) for row in rows] == list(range(1, 31))
    for row in rows:
        index = int(row["train_index"])
        assert row["train_id"] == f"img-{index}"
        assert float(row["self_influence"]) == pytest.approx(float(held[index]), rel=1e-4)
        assert row["label"] == ["cat", "dog", "elk"][index % 3]
        assert (row["label"] != row["suggested_label"]) == (index == 3)
        assert float(row["label_probability"]) == pytest.approx(index / 29, abs=1e-5)
        assert float(row["loss"]) == pytest.approx(0.1 + 0.8 * index / 29, abs=1e-5)
    figures = section_of(told).split('class="train suspect')[1:]
    assert [int(re.findall(r"#img-(\d+)<", part)[0]) for part in figures] == order[:24]
    reds = [
        int(re.findall(r"#img-(\d+)<", part)[0]) for part in figures if 'class="wrong"' in part.split("</figure>")[0]
    ]
    assert reds == [3]
    assert "**Look first**" in summary(told)
    assert f"#img-{order[0]}, #img-{order[1]}" in summary(told)


def red(pixels: np.ndarray) -> int:
    return int((pixels == np.array(NEGATIVE)).all(2).sum())


def test_what_the_network_calls_otherwise_is_in_red() -> None:
    told, _ = told_of_images(Display(class_names=["cat", "dog", "elk"]))
    assert red(draw_suspects(told)) > 0
    right, y = images(wrong=[])
    found = scored(torch.randn(1, 30), right, y, y[:1])
    agreed = describe_influence(Fixed(), CLASSES, found, right, right.at([0]), 2, Display(), suspected(right, y, y))
    assert red(draw_suspects(agreed)) == 0
    assert red(gallery_of(agreed, "0")) == 0
    assert 'class="wrong"' not in section_of(agreed)
    assert red(gallery_of(told, "1")) > red(gallery_of(told, "0"))


def test_without_self_influence_there_are_no_suspects() -> None:
    train, y = images()
    told = describe_influence(
        Fixed(), CLASSES, scored(torch.randn(1, 30), train, y, y[:1]), train, train.at([0]), 2, Display()
    )
    assert (told.suspects, told.suspect_rows) == ([], [])
    assert [picture.file for picture in influence_findings(told, 1).pictures] == ["query-0"]
    assert "self_influence.csv" not in influence_findings(told, 1).files
    assert "Look at these training samples first" not in section_of(told)


def test_duplicates_and_spot_checks_are_said() -> None:
    checks = [SpotCheck(0, place, 0.1 * place, 0.2 * place) for place in range(5)]
    told, _ = told_of_images(Display(sample_id=lambda i: f"s{i}"), duplicates={1: [7]}, spot_checks=checks)
    assert "query #s1 is training sample #7: its own score is" in section_of(told)
    assert "query #s1 is training sample #7: its own score is" in summary(told)
    assert "Checked by retraining" in section_of(told)
    assert "<td>#s0</td><td>#s4</td><td>+4.00e-01</td><td>+8.00e-01</td>" in section_of(told)
    assert influence_findings(told, 1).pictures[-1].tag == "influence/spot_check"
    train, y = images()
    found = scored(torch.randn(1, 30), train, y, y[5:6], duplicates={0: (8, 9)})
    named = summary(describe_influence(Fixed(), CLASSES, found, train, train.at([5]), 2, Display()))
    assert f"query #5 is training sample #8: its own score is {float(found.scores[0, 8]):+.2e}" in named
    assert f"query #5 is training sample #9, under another label: its own score is {found.scores[0, 9]:+.2e}" in named
    assert "correlate by 1.00 in 5 checks" in section_of(told)
    assert f"How far to trust it: {told.trust.level}" in section_of(told)


def test_scores_without_a_unit_are_said_to_have_none() -> None:
    train, y = images()
    found = scored(torch.randn(1, 30), train, y, y[:1], unit="none")
    told = describe_influence(Fixed(), CLASSES, found, train, train.at([0]), 2, Display())
    for text in (section_of(told), summary(told)):
        assert "units of the" not in text
        assert "only their order" in text


def told_of_a_table(display: Display, columns: int = 4, **task: Any) -> InfluenceReport:
    x, y = torch.randn(12, columns), torch.arange(12) % 2
    x[:, 0] = y.float()
    train = Samples(TensorDataset(x, y))
    return describe_influence(
        Fixed(2),
        Task(**task) if task else CLASSES,
        scored(torch.randn(1, 12), train, y, y[:1]),
        train,
        train.at([0]),
        2,
        display,
        suspected(train, y, y),
    )


def test_a_tables_row_is_its_names_and_values() -> None:
    told = told_of_a_table(Display(column_names=["age", "in<come", "debt"]))
    cells = told.cards[0].html.cells
    value = told.cards[0].view.value
    assert [name for name, _ in cells] == ["age", "in<come", "debt", "x3"]
    assert [float(number) for _, number in cells] == pytest.approx(value.tolist(), rel=1e-2)
    assert ">in&lt;come</td>" in section_of(told)
    assert "in<come" not in section_of(told)
    assert "data:image" not in section_of(told)
    wide = told_of_a_table(Display(), columns=30).cards[0]
    assert wide.html.cells[-1] == ("… 20 more", "")
    names = [name for name, _ in wide.html.cells]
    largest = wide.view.value.abs().topk(10).indices.sort().values
    assert names[:-1] == [f"x{place}" for place in largest.tolist()]
    assert all([name for name, _ in held.html.cells] == names for ranking in wide.lists for held in ranking.samples)


class Text(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length = 80 if index == 0 else 3 + index % 3
        mask = torch.arange(90) < length
        ids = torch.full((90,), index + 1) * mask
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.tensor(index % 2)}


class Reader(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return nn.functional.one_hot(input_ids[:, 0] % 2, 2).float()


def test_text_is_its_words_escaped_cut_and_without_padding() -> None:
    train, y = Samples(Text(), batch_size=5), torch.arange(12) % 2
    words = Display(decode=lambda ids: [f"<w{i}>&" if i else "[PAD]" for i in ids.tolist()])
    found = scored(torch.linspace(1, 2, 12)[None], train, y, y[:1])
    told = describe_influence(Reader(), CLASSES, found, train, train.at([0]), 12, words, suspected(train, y, y))
    card = told.cards[0]
    assert card.html.text == "<w1>& " * 60 + "…"
    assert [held.html.text for held in card.lists[0].samples if held.view.id == "5"] == ["<w6>& " * 4 + "<w6>&"]
    assert "PAD" not in section_of(told)
    assert "<w" not in section_of(told)
    assert "&lt;w6&gt;&amp; &lt;w6" in section_of(told)
    assert "data:image" not in section_of(told)


class Sizes(Dataset):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((3, 6 + index % 4, 5 + index % 3), float(index % 2)), torch.tensor(index % 2)


def test_images_of_a_list_keep_their_sizes() -> None:
    def collate(rows: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
        return [x for x, _ in rows], torch.stack([y for _, y in rows])

    train, y = Samples(Sizes(), batch_size=4, collate=collate), torch.arange(9) % 2
    found = scored(torch.linspace(1, 2, 9)[None], train, y, y[:1])
    told = describe_influence(Fixed(2), CLASSES, found, train, train.at([0]), 9, Display(), suspected(train, y, y))
    for held in told.cards[0].lists[0].samples:
        assert torch.equal(held.view.value, train.dataset[int(held.view.id)][0])
        assert not held.view.wrong


@pytest.mark.parametrize("kind", ["image", "table", "text"])
def test_private_inputs_are_not_in_what_is_told(kind: str) -> None:
    display = Display(show_inputs=False, decode=lambda ids: ["secret"] * len(ids), column_names=["secret"] * 4)
    if kind == "text":
        train, y = Samples(Text()), torch.arange(12) % 2
        found = scored(torch.randn(1, 12), train, y, y[:1])
        told = describe_influence(Reader(), CLASSES, found, train, train.at([0]), 2, display, suspected(train, y, y))
    else:
        told = told_of_a_table(display) if kind == "table" else told_of_images(display)[0]
    assert "secret" not in section_of(told)
    assert "data:image" not in section_of(told)
    assert section_of(told).count("not shown (show_inputs=False)") > 5
    assert all(not held.html.cells for ranking in told.cards[0].lists for held in ranking.samples)


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1]


def test_regression_shows_values_and_no_probability() -> None:
    x = torch.linspace(0, 1, 12)[:, None].repeat(1, 3)
    y = x[:, :1] + 0.25
    train = Samples(TensorDataset(x, y))
    found = scored(torch.randn(1, 12), train, y, y[:1])
    told = describe_influence(
        Identity(), Task(kind="regression"), found, train, train.at([4]), 2, Display(), suspected(train, y, None)
    )
    assert [ranking.heading for ranking in told.cards[0].lists] == ["Helpful", "Harmful"]
    assert (told.cards[0].view.label, told.cards[0].view.prediction) == ("0.6136", "0.3636")
    assert "p(label)" not in section_of(told)
    assert "network: 0.3636" in section_of(told)
    rows = list(csv.DictReader(io.StringIO(file_of(told, "self_influence.csv"))))
    assert {row["suggested_label"] for row in rows} | {row["label_probability"] for row in rows} == {""}
    assert {row["label"] for row in rows} == {f"{float(value):.4g}" for value in y}


class Signs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_several_labels_are_named() -> None:
    x = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, -1.0], [1.0, 1.0, -1.0]])
    y = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    train, display = Samples(TensorDataset(x, y)), Display(class_names=["sun", "rain", "wind"])
    found = scored(torch.tensor([[0.1, 0.3, 0.2]]), train, y, y[:1])
    told = describe_influence(
        Signs(), Task(kind="multilabel"), found, train, train.at([0]), 3, display, suspected(train, y, None)
    )
    helpful = told.cards[0].lists[0].samples
    assert [(held.view.label, held.view.prediction, held.view.wrong) for held in helpful] == [
        ("rain", "none", True),
        ("sun, rain", "sun, rain", False),
        ("sun, wind", "sun, wind", False),
    ]
    assert {row.train_label for row in told.rows} == {"rain", "sun, rain", "sun, wind"}


def test_binary_floats_get_their_names_in_both_tables() -> None:
    x = torch.linspace(-1, 1, 8)[:, None]
    y = (x > 0).float()
    train, display = Samples(TensorDataset(x, y)), Display(class_names=["off", "on"])
    found = scored(torch.randn(1, 8), train, y, y[:1])
    told = describe_influence(
        Identity(), Task(kind="binary"), found, train, train.at([0]), 2, display, suspected(train, y, y[:, 0].long())
    )
    assert {row.train_label for row in told.rows} == {"off", "on"}
    assert {row.label for row in told.suspect_rows} == {"off", "on"}


def test_the_columns_of_the_tables_stay() -> None:
    told, _ = told_of_images()
    assert file_of(told, "influence.csv").splitlines()[0] == (
        "query_id,query_label,query_prediction,query_loss,list,rank,train_index,train_id,train_label,score"
    )
    assert file_of(told, "self_influence.csv").splitlines()[0] == (
        "rank,train_index,train_id,label,suggested_label,label_probability,self_influence,loss"
    )
