"""What `InputAttribution` costs at its defaults: `python -m benchmarks.attribution_callback` (`--quick`: fewer steps).

A ResNet-18-like network with a 3 × 3 stem is trained on 32 × 32 images, one thread. The steps of an epoch of 50,000
images are too many for a benchmark: some are timed, and the epoch is reckoned from their median. The callback's own
seconds are those that it logs, over five epochs of a few steps: the fifth is one in which deletion, insertion and the
sanity check are measured, the evaluation after training comes on top.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.nets import ResNet18
from lightning_interp import InputAttribution

EPOCH, BATCH, EPOCHS = 50_000, 128, 5


class Trained(L.LightningModule):
    """The network, whose training steps are timed."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResNet18(small=True)
        self.began = 0.0
        self.seconds: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self(batch[0])

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def images(n: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(n)
    return TensorDataset(torch.rand(n, 3, 32, 32, generator=generator), torch.arange(n) % 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one step an epoch")
    steps = 1 if parser.parse_args().quick else 3
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    module = Trained()
    with tempfile.TemporaryDirectory() as folder:
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = L.Trainer(
            max_epochs=EPOCHS, default_root_dir=folder, callbacks=[InputAttribution()], log_every_n_steps=1, **quiet
        )
        trainer.fit(module, DataLoader(images(steps * BATCH), BATCH), DataLoader(images(512), 256))
        events = EventAccumulator(str(trainer.log_dir), size_guidance={"scalars": 0}).Reload()
        spent = [event.value for event in events.Scalars("interp_seconds/InputAttribution")]
    step = statistics.median(module.seconds)
    epoch = step * EPOCH / BATCH
    costs = spent[:EPOCHS]
    print(f"A step of {BATCH} takes {step:.2f} s, an epoch of {EPOCH:,} images {epoch:.0f} s.")
    print(f"The callback's seconds at each of {EPOCHS} epochs: {', '.join(f'{value:.2f}' for value in costs)}")
    print(f"(the first with the evaluation before training), and {spent[-1]:.2f} at the end of training.")
    print(f"In the mean {statistics.mean(costs):.2f} s, {statistics.mean(costs) / epoch:.2%} of an epoch.")


if __name__ == "__main__":
    main()
