"""Does retraining agree with the demo's influence scores? `python -m benchmarks.demo_retraining RUN_FOLDER`.

For the first queries of a finished demo run, the network is retrained without their 40 most helpful training digits,
and without their 40 most harmful ones; the query's loss, in the mean over seeds, stands beside the scores' sum.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import Subset, default_collate

from callbacks_demo.mnist import Digits, SmallCNN

QUERIES, LEFT_OUT, SEEDS, EPOCHS = 3, 40, 4, 6


class Fewer(Digits):
    """The demo's digits without some of the training ones."""

    def __init__(self, without: Sequence[int]) -> None:
        super().__init__()
        self.without = set(without)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        remaining = [index for index in self.train.indices if index not in self.without]
        self.train = Subset(self.train.dataset, remaining)


def losses(without: Sequence[int], queries: Sequence[int]) -> list[float]:
    """Return each query's loss after retraining, in the mean over seeds."""
    batch_losses = []
    for seed in range(SEEDS):
        L.seed_everything(seed, verbose=False)
        digits, net = Fewer(without), SmallCNN()
        trainer = L.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(net, datamodule=digits)
        images, labels = default_collate([digits.train.dataset[query] for query in queries])
        with torch.no_grad():
            logits = net.eval()(images)
        batch_losses.append(F.cross_entropy(logits, labels, reduction="none"))
    means: list[float] = torch.stack(batch_losses).mean(0).tolist()
    return means


def main(run: Path) -> None:
    torch.set_num_threads(1)
    with open(run / "influence" / "influence.csv", newline="") as file:
        queries = list(dict.fromkeys(int(row["query_id"]) for row in csv.DictReader(file)))[:QUERIES]
    record = load_file(run / "influence" / "scores.safetensors")
    before = losses([], queries)
    for position, query in enumerate(queries):
        order = record["scores"][position].argsort(descending=True)
        for name, columns in (("helpful", order[:LEFT_OUT]), ("harmful", order[-LEFT_OUT:])):
            after = losses(record["train_index"][columns].tolist(), queries)[position]
            predicted = float(record["scores"][position][columns].sum())
            print(
                f"query {query}: without its {LEFT_OUT} most {name}: loss {before[position]:.2f} → {after:.2f}"
                f" ({after - before[position]:+.2f}); sum of scores {predicted:+.1f}"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
