"""The demo: trains a small network on real digits with all three callbacks, and prints where their results are.

`python -m callbacks_demo NAME` runs an experiment instead: `correspondence` and `bottom_up` of similarity, `shapes`,
`photographs`, `tokens` and `lime_text` of attribution, `leave_one_out`, `mislabelled` and `poisoned` of influence.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch

from callbacks_demo.mnist import Digits, SmallCNN
from lightning_interp import DataInfluence, InputAttribution, RepresentationSimilarity

EXPERIMENTS = (
    *("correspondence", "bottom_up"),
    *("shapes", "photographs", "tokens", "lime_text"),
    *("leave_one_out", "mislabelled", "poisoned"),
)


def main(arguments: Sequence[str] | None = None) -> L.Trainer:
    """Train, write all results below `--folder`, and print where they are."""
    parser = argparse.ArgumentParser(prog="python -m callbacks_demo", description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=Path("."), help="lightning_logs is created in it")
    options = parser.parse_args(arguments)

    # With small layers a second thread gains little, and on a busy machine the two wait for each other.
    torch.set_num_threads(1)
    L.seed_everything(0)
    trainer = L.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        default_root_dir=options.folder,
        log_every_n_steps=10,
        callbacks=[RepresentationSimilarity(), InputAttribution(), DataInfluence()],
    )
    trainer.fit(SmallCNN(), datamodule=Digits())
    print_where_to_look(trainer)
    return trainer


def print_where_to_look(trainer: L.Trainer) -> None:
    """Print the accuracy, and where to find and how to read the results."""
    run = Path(trainer.log_dir or ".")
    print(
        f"""
Trained for {trainer.current_epoch} epochs: validation accuracy {trainer.callback_metrics["val_accuracy"]:.1%}. \
Three callbacks recorded how the network learned.

1. The report of all three callbacks. Open this file in a browser; it needs no other file:
    {(run / "interp" / "report.html").absolute()}

2. The training, epoch by epoch, in TensorBoard. Start it, then open the address that it prints:
    {Path(sys.executable).parent / "tensorboard"} --logdir {run.parent} --samples_per_plugin images=1000
  SCALARS  similarity_to_initial, similarity_to_final: how similar each layer is to its first and last state
  IMAGES   similarity_maps: all layers and epochs in one picture
           attribution: the pixels that speak for the prediction; drag the step slider to go through the epochs
           influence: the training digits that helped or harmed a prediction

3. The influence scores as a table, for a spreadsheet or pandas:
    {(run / "interp" / "influence" / "influence.csv").absolute()}"""
    )


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in EXPERIMENTS:
        importlib.import_module(f"callbacks_demo.{sys.argv[1]}").main(sys.argv[2:])
    else:
        main()
