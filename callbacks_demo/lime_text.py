"""Does an explanation find the words that a model really uses? Section 5.2 of "Why should I trust you?" (2016).

The documents are functions of Python's own standard library: the words of their names, comments and texts, each present
or absent. The class is the group of modules that a function is from, those for networking or those for text
formats. Two models are trained whose reasons are known: a logistic regression with so strong an L1
penalty, and a decision tree so shallow, that no document has more than ten words that they use. The words with a weight
that are in a document, and the words of its path through the tree that are in it, are its gold set.

The tree's leaves hold at least five documents, so that their probabilities differ. Grown until every leaf is pure
(`--leaf 1`), the tree splits on words between leaves with equal predictions. Such a word is in the gold set and yet
changes nothing, whatever else is removed: no explanation by removing words can find it.

Each way to explain names ten words of a document. Its recall is the share of the gold set among them, in the mean over
held-out documents with a gold set. LIME and greedy removal use only the models' probabilities; Parzen windows
imitate the model as a whole, from its predictions for the training documents. All pick from the words that are in the
document; those of random picks are the expected value.

The paper's numbers are of its reviews of books; those of DVDs are alike. Other texts, other classes: what random picks
find shows how similar the two tasks are in difficulty.
"""

from __future__ import annotations

import argparse
import ast
import io
import keyword
import re
import sysconfig
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor, nn

from lightning_interp.attribution import LIME, any_size

GROUPS = {
    "network": "asyncio ftplib http imaplib ipaddress nntplib poplib selectors smtplib socket socketserver ssl"
    " telnetlib urllib webbrowser wsgiref xmlrpc",
    "formats": "argparse ast configparser csv difflib email gettext html json mailbox mimetypes optparse pickle"
    " plistlib pprint re string tarfile textwrap tokenize tomllib xml zipfile",
}
K = 10
PAPER = {
    "LIME": (92.1, 97.0),
    "Parzen windows": (72.8, 78.9),
    "greedy removal": (64.3, 37.0),
    "random": (17.4, 20.6),
}
WORD = re.compile("[a-z]{3,}")


class Documents(NamedTuple):
    """Words that are present `(n, words)`, 0 or 1, the class of each document `(n,)`, and the words."""

    present: Tensor
    classes: Tensor
    words: list[str]

    def of(self, rows: Tensor) -> Documents:
        return Documents(self.present[rows], self.classes[rows], self.words)


class KnownModel(NamedTuple):
    """A model whose reasons are known.

    Args:
        net: presence `(n, words)` → probabilities `(n, 2)`.
        gold: one document → which words the model uses in it, `(words,)`.
        accuracy: on held-out documents.
    """

    net: nn.Module
    gold: Callable[[Tensor], Tensor]
    accuracy: float


Explainer = Callable[[nn.Module, Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train both models, explain held-out documents in all ways, print the table and return its recalls."""
    parser = argparse.ArgumentParser(prog="python -m callbacks_demo lime_text", description=__doc__)
    parser.add_argument("--documents", type=int, default=200, help="held-out documents that are explained")
    parser.add_argument("--samples", type=int, default=2000, help="perturbed copies of each for LIME")
    parser.add_argument("--leaf", type=int, default=5, help="training documents in a leaf of the tree, at least")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    train, test = split(read_documents(), options.documents)
    models = [sparse_regression(train, test), shallow_tree(train, test, options.leaf)]
    recalls: dict[str, list[float]] = {}
    for name in PAPER:
        recalls[name] = [recall(explainer(name, options.samples, model, train), model, test) for model in models]
    print("\n".join([*table(recalls), "", *remarks(train, test, models)]))
    print(f"Took {time.perf_counter() - started:.0f} s.")
    return recalls


def read_documents(least: int = 30, common: int = 10) -> Documents:
    """Return the functions that have at least `least` words, of words that are in at least `common` functions."""
    texts = [(words, label) for label, names in enumerate(GROUPS.values()) for words in functions(names.split())]
    counts = Counter(word for words, _ in texts for word in words)
    vocabulary = sorted(word for word, count in counts.items() if count >= common)
    columns = {word: label for label, word in enumerate(vocabulary)}
    present = torch.zeros(len(texts), len(vocabulary))
    for document, (words, _) in enumerate(texts):
        present[document, [columns[word] for word in words if word in columns]] = 1
    long = present.sum(1) >= least
    return Documents(present[long], torch.tensor([label for _, label in texts])[long], vocabulary)


def functions(modules: Sequence[str]) -> Iterator[set[str]]:
    """Yield the words of each outermost function and method of the given modules and packages."""
    library = Path(sysconfig.get_path("stdlib"))
    for module in modules:
        files = sorted((library / module).rglob("*.py")) or [library / f"{module}.py"]
        for file in filter(Path.exists, files):
            source = file.read_text(encoding="utf-8")
            lines = source.split("\n")
            for node in outermost_functions(ast.parse(source)):
                first, *following = lines[node.lineno - 1 : node.end_lineno]
                yield words_of("\n".join([first[node.col_offset :], *following, ""]))


def outermost_functions(node: ast.AST) -> Iterator[Any]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from outermost_functions(child)


def words_of(source: str) -> set[str]:
    """Return the words of a function's names, comments and texts, in lower case.

    >>> sorted(words_of("def read_line(self):  # a line"))
    ['line', 'read', 'self']
    """
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kinds = (tokenize.NAME, tokenize.COMMENT, tokenize.STRING)
    texts = (token.string.lower() for token in tokens if token.type in kinds)
    return {word for text in texts for word in WORD.findall(text) if not keyword.iskeyword(word)}


def split(documents: Documents, held_out: int) -> tuple[Documents, Documents]:
    """Return documents to train on and those to explain, by a fixed shuffle."""
    order = torch.randperm(len(documents.present), generator=torch.Generator().manual_seed(0))
    return documents.of(order[held_out:]), documents.of(order[:held_out])


def sparse_regression(train: Documents, test: Documents) -> KnownModel:
    """Return the logistic regression with the weakest L1 penalty that uses at most K words of any document."""
    everything = torch.cat([train.present, test.present])
    for strength in torch.logspace(1, -3, 60).tolist():
        regression = LogisticRegression(C=strength, l1_ratio=1.0, solver="liblinear", random_state=0)
        regression.fit(train.present.numpy(), train.classes.numpy())
        weights = torch.from_numpy(regression.coef_[0])
        if int((everything * (weights != 0)).sum(1).max()) <= K:
            break
    net = Regression(weights.float(), float(regression.intercept_[0]))
    return KnownModel(net, lambda document: (weights != 0) & (document > 0), accuracy_on(net, test))


class Regression(nn.Module):
    weights: Tensor

    def __init__(self, weights: Tensor, bias: float) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.bias = bias

    def forward(self, present: Tensor) -> Tensor:
        chance = (present @ self.weights + self.bias).sigmoid()
        return torch.stack([1 - chance, chance], 1)


def shallow_tree(train: Documents, test: Documents, leaf: int) -> KnownModel:
    """Return the deepest decision tree whose paths hold at most K words of any document."""
    everything = torch.cat([train.present, test.present])
    for depth in range(100, 0, -1):
        tree = DecisionTreeClassifier(max_depth=depth, min_samples_leaf=leaf, random_state=0)
        tree.fit(train.present.numpy(), train.classes.numpy())
        if int((words_on_path(tree, everything) & (everything > 0)).sum(1).max()) <= K:
            break
    net = Tree(tree)
    return KnownModel(
        net, lambda document: words_on_path(tree, document[None])[0] & (document > 0), accuracy_on(net, test)
    )


class Tree(nn.Module):
    def __init__(self, tree: DecisionTreeClassifier) -> None:
        super().__init__()
        self.tree = tree

    def forward(self, present: Tensor) -> Tensor:
        return torch.from_numpy(self.tree.predict_proba(present.numpy())).float()


def words_on_path(tree: DecisionTreeClassifier, present: Tensor) -> Tensor:
    """Return which words the tree tests on each document's path, `(n, words)`."""
    nodes = torch.from_numpy(tree.decision_path(present.numpy()).toarray())
    features = torch.from_numpy(tree.tree_.feature)
    used = torch.zeros(len(present), present.shape[1], dtype=torch.bool)
    for node in (features >= 0).nonzero()[:, 0].tolist():
        used[:, features[node]] |= nodes[:, node] > 0
    return used


def accuracy_on(net: nn.Module, documents: Documents) -> float:
    return float((net(documents.present).argmax(1) == documents.classes).double().mean())


def recall(explain: Explainer, model: KnownModel, test: Documents) -> float:
    """Return the mean share of the gold set among the named words; documents without a gold set are left out."""
    shares = []
    for document in test.present:
        gold = model.gold(document)
        if bool(gold.any()):
            shares.append((explain(model.net, document) * gold).sum() / gold.sum())
    return float(torch.stack(shares).mean())


def explainer(name: str, samples: int, model: KnownModel, train: Documents) -> Explainer:
    """Return a function (network, document) → the probability that each word is named, `(words,)`."""
    if name == "LIME":
        method = LIME(samples, parts=words_present, features=K, draw=any_size, batch_size=500)
        return lambda net, document: named_by_lime(method, net, document)
    if name == "Parzen windows":
        return Parzen.fitted(model.net, train)
    return greedily if name == "greedy removal" else at_random


def words_present(document: Tensor) -> Tensor:
    """Return each present word as a part; what is absent stays."""
    return torch.arange(len(document)).where(document > 0, -1)


def named_by_lime(lime: LIME, net: nn.Module, document: Tensor) -> Tensor:
    target = net(document[None]).argmax(1)
    return lime(net, document[None], target).maps[0] != 0


@dataclass(frozen=True, eq=False)
class Parzen:
    """Imitates a model as a whole; a document's words are ranked by the gradient there (Baehrens et al., 2010).

    p(x) = Σ k(x − x_i) p_i / Σ k(x − x_i) over training documents, k a Gaussian, p_i the model's prediction for x_i.
    """

    present: Tensor
    says: Tensor
    variance: float

    @classmethod
    def fitted(cls, net: nn.Module, train: Documents) -> Parzen:
        """Return the windows whose width imitates the model best on training documents that they were not fitted to."""
        fitting, unseen = train.present[::2], train.present[1::2]
        says, targets = net(fitting), net(unseen)[:, 1]
        widths = [2.0**power for power in range(-1, 8)]
        errors = [float((cls(fitting, says, width).probability(unseen) - targets).square().mean()) for width in widths]
        return cls(train.present, net(train.present), widths[errors.index(min(errors))])

    def shares(self, present: Tensor) -> Tensor:
        return (-torch.cdist(present, self.present).square() / (2 * self.variance)).softmax(1)

    def probability(self, present: Tensor) -> Tensor:
        return self.shares(present) @ self.says[:, 1]

    def __call__(self, net: nn.Module, document: Tensor) -> Tensor:
        """Return the K present words of the steepest gradient."""
        leaf = document[None].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.probability(leaf).sum(), leaf)
        return strongest_words(gradient[0].abs(), document)


def greedily(net: nn.Module, document: Tensor) -> Tensor:
    """Return the words whose removal lowers the predicted class the most, one by one until it changes or K are gone."""
    left = document.clone()
    label = int(net(left[None]).argmax())
    for _ in range(K):
        words = left.nonzero()[:, 0]
        without = left.repeat(len(words), 1)
        without[torch.arange(len(words)), words] = 0
        left[words[net(without)[:, label].argmin()]] = 0
        if int(net(left[None]).argmax()) != label:
            break
    return document > left


def at_random(net: nn.Module, document: Tensor) -> Tensor:
    """Return the chance that each present word is among K random ones."""
    return document * min(1.0, K / float(document.sum()))


def strongest_words(values: Tensor, document: Tensor) -> Tensor:
    """Return the K present words of the largest values."""
    indices = values.masked_fill(document == 0, -1).topk(K).indices
    return torch.zeros_like(document).index_fill(0, indices, 1) * document


def table(recalls: dict[str, list[float]]) -> list[str]:
    """Return the lines of the table, one row per way to explain, in percent."""
    lines = [f"{'recall, %':18}{'logistic regression':>21}{'paper':>8}{'decision tree':>17}{'paper':>8}"]
    for name, (regression, tree) in PAPER.items():
        ours = [100 * value for value in recalls[name]]
        lines.append(f"{name:18}{ours[0]:>21.1f}{regression:>8.1f}{ours[1]:>17.1f}{tree:>8.1f}")
    return lines


def remarks(train: Documents, test: Documents, models: Sequence[KnownModel]) -> list[str]:
    """Return the conclusions and how to read the table."""
    lines = [
        f"{len(train.present)} functions to train on and {len(test.present)} held out, {len(train.words)} words, of"
        f" which a held-out function has {float(test.present.sum(1).median()):.0f} in the median."
    ]
    for name, model in zip(("Logistic regression", "Decision tree"), models, strict=True):
        sizes = torch.stack([model.gold(document).sum() for document in test.present])
        lines.append(
            f"{name}: held-out accuracy {model.accuracy:.1%} (the larger class has"
            f" {float(torch.bincount(test.classes).max() / len(test.classes)):.1%});\n  gold sets of at most"
            f" {int(sizes.max())} words, {float(sizes[sizes > 0].double().mean()):.1f} in the mean over the"
            f" {int((sizes > 0).sum())} functions that have one."
        )
    return lines


if __name__ == "__main__":
    main()
