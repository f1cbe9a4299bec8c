"""The main job: train a small network on real digits with all three callbacks, and say where to look.

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
    """Train, write everything below `--folder`, and print where it is."""
    parser = argparse.ArgumentParser(prog="python -m callbacks_demo", description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where lightning_logs is made")
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
    tell(trainer)
    return trainer


def tell(trainer: L.Trainer) -> None:
    """Say in plain words what came out and where to look."""
    run = Path(trainer.log_dir or ".")
    print(
        f"""
Trained {trainer.current_epoch} epochs; validation accuracy {trainer.callback_metrics["val_accuracy"]:.1%}.

Watch how the layers changed and where the network looks, epoch after epoch:
    {Path(sys.executable).parent / "tensorboard"} --logdir {run.parent} --samples_per_plugin images=1000
  SCALARS  similarity_to_initial, similarity_to_final: each layer at each epoch
  IMAGES   similarity_maps: all layers and epochs; attribution: drag a step slider to play the film;
           influence: the training digits that helped and hurt

Open the report of all three, or hand it around:
    {(run / "interp" / "report.html").absolute()}
The scores as a table:
    {(run / "interp" / "influence" / "influence.csv").absolute()}"""
    )


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in EXPERIMENTS:
        importlib.import_module(f"callbacks_demo.{sys.argv[1]}").main(sys.argv[2:])
    else:
        main()
