"""The experiment on words that a model truly uses: a small run, and its parts on documents whose answer is known."""

from __future__ import annotations

import pytest
import torch
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor, nn

from callbacks_demo import lime_text
from callbacks_demo.lime_text import Documents, Parzen, Regression, Tree
from lightning_interp.attribution import LIME


def test_words_of_names_comments_and_texts() -> None:
    source = "def fetch_url(self, x):\n    '''Opens a page.'''\n    return HTTP_open(42, x)  # may raise\n"
    assert lime_text.words_of(source) == {"fetch", "url", "self", "opens", "page", "http", "open", "may"}


def test_methods_are_documents_of_their_own() -> None:
    found = list(lime_text.functions(["textwrap"]))
    assert len(found) > 10
    assert any({"fill", "text", "width"} <= words for words in found)
    assert list(lime_text.functions(["no_such_module"])) == []


def planted(n: int = 300) -> Documents:
    """Documents of 20 words whose class is words 0 and 1 together, or word 2."""
    present = (torch.rand(n, 20) < 0.5).float()
    present[:, 10:] = 1
    classes = ((present[:, 0] * present[:, 1] + present[:, 2]) > 0).long()
    return Documents(present, classes, [f"word{place}" for place in range(20)])


def test_words_on_the_path() -> None:
    documents, noise = planted(), (torch.rand(300) < 0.5).long()
    tree = DecisionTreeClassifier(random_state=0).fit(documents.present.numpy(), noise.numpy())
    assert len(set(tree.tree_.feature.tolist())) < (tree.tree_.feature >= 0).sum(), (
        "words are asked about in two places"
    )
    asked = lime_text.words_on_path(tree, documents.present)
    for document, found in zip(documents.present, asked, strict=True):
        expected, node = set(), 0
        while tree.tree_.children_left[node] >= 0:
            feature = int(tree.tree_.feature[node])
            expected.add(feature)
            side = tree.tree_.children_left if document[feature] <= tree.tree_.threshold[node] else None
            node = (tree.tree_.children_right if side is None else side)[node]
        assert set(found.nonzero()[:, 0].tolist()) == expected


def test_the_models_reasons_are_known() -> None:
    train, test = lime_text.split(planted(), 50)
    assert len(test.present) == 50
    assert len(train.present) == 250
    tree, regression = lime_text.shallow_tree(train, test, 5), lime_text.sparse_regression(train, test)
    both = torch.zeros(20)
    both[[0, 1, 10, 11]] = 1
    assert tree.gold(both).nonzero()[:, 0].tolist() == [0, 1]
    assert tree.accuracy == 1
    assert regression.accuracy > 0.7
    used = regression.net.weights != 0
    assert torch.equal(regression.gold(both), used & (both > 0))
    assert int((torch.cat([train.present, test.present]) * used).sum(1).max()) <= 10
    chances = regression.net(test.present)
    assert torch.allclose(chances.sum(1), torch.ones(50))


def net() -> Regression:
    weights = torch.zeros(20)
    weights[[3, 5, 12]] = torch.tensor([2.0, -3.0, 1.0])
    return Regression(weights, 0.1)


def test_lime_names_words_of_the_document_alone() -> None:
    document = torch.zeros(20)
    document[[1, 3, 7, 12]] = 1
    assert lime_text.words_present(document).unique().tolist() == [-1, 1, 3, 7, 12]
    lime = LIME(100, parts=lime_text.words_present, features=2)
    assert lime_text.named_by_lime(lime, net(), document).nonzero()[:, 0].tolist() == [3, 12]


def test_greedy_removal_stops_where_the_class_changes() -> None:
    document = torch.ones(20)
    document[5] = 0
    assert lime_text.greedily(net(), document).nonzero().shape[0] == 10
    against = Regression(net().weights, -1.5)
    assert lime_text.greedily(against, document).nonzero()[:, 0].tolist() == [3]


def test_parzen_windows_have_the_gradient_of_their_estimate() -> None:
    known, document = (torch.rand(40, 20) < 0.5).float(), torch.ones(20)
    document[:4] = 0
    windows = Parzen(known, net()(known), 4.0)

    def estimate(x: Tensor) -> float:
        kernel = torch.exp(-((x - known) ** 2).sum(1).double() / 8)
        return float((kernel * net()(known)[:, 1]).sum() / kernel.sum())

    assert float(windows.probability(document[None])) == pytest.approx(estimate(document), abs=1e-6)
    step = 1e-2 * torch.eye(20)
    slopes = torch.tensor([(estimate(document + s) - estimate(document - s)) / 2e-2 for s in step])
    expected = (slopes.abs() * document).topk(10).indices.tolist()
    assert sorted(windows(net(), document).nonzero()[:, 0].tolist()) == sorted(expected)


def test_recall_of_random_picks_is_the_expected_one() -> None:
    document = torch.zeros(100)
    document[:40] = 1
    assert float(lime_text.at_random(nn.Identity(), document)[0]) == pytest.approx(0.25)
    model = lime_text.KnownModel(nn.Identity(), lambda d: (torch.arange(100) < 4) & (d > 0), 1.0)
    empty = torch.zeros(100)
    empty[50:] = 1
    documents = Documents(torch.stack([document, empty]), torch.tensor([0, 1]), [])
    assert lime_text.recall(lime_text.at_random, model, documents) == pytest.approx(0.25)


def test_a_wrapped_tree_says_what_the_tree_says() -> None:
    documents = planted()
    tree = DecisionTreeClassifier(max_depth=2, random_state=0)
    tree.fit(documents.present.numpy(), documents.classes.numpy())
    expected = torch.from_numpy(tree.predict_proba(documents.present.numpy())).float()
    assert torch.equal(Tree(tree)(documents.present), expected)


def test_lime_recovers_the_words_and_others_do_less_well(capsys: pytest.CaptureFixture[str]) -> None:
    recalls = lime_text.main(["--documents", "30", "--samples", "300", "--leaf", "10"])
    said = capsys.readouterr().out
    for place in range(2):
        lime, *others = [recalls[name][place] for name in lime_text.PAPER]
        assert lime >= 0.9
        assert lime > max(others)
    assert next(line for line in said.splitlines() if line.startswith("LIME ")).split()[2::2] == ["92.1", "97.0"]
    assert "and 30 held out" in said
    assert "Decision tree: held-out accuracy" in said
