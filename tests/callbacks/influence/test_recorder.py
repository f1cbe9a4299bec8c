"""What the recorder counts in real training runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_interp.callbacks.influence.recorder import Recorder
from lightning_interp.influence.trajectory import Trajectory
from tests.models import Net, loaders, trainer


class Recording(Callback):
    """Does nothing but record."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.found: Trajectory | None = None

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.recorder.step(trainer, pl_module, optimizer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found = self.recorder.finish(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return self.recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recorder.load_state_dict(state_dict)


class TwoLayers(L.LightningModule):
    """A backbone and a head, with the optimizers given."""

    def __init__(self, optimizers: Callable[[TwoLayers], Any]) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.optimizers_of = optimizers

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.backbone(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


def data(n: int = 12) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(n, 4), torch.arange(n) % 3), 4)


def recorded(folder: File, module: L.LightningModule, callbacks: Any = (), **options: Any) -> Trajectory:
    """Train for 2 epochs of 3 batches, and return what was recorded."""
    recording = Recording()
    silent = {"logger": False, "enable_checkpointing": False} | options
    trainer(folder, callbacks=[recording, *callbacks], **silent).fit(module, data())
    assert recording.found is not None
    return recording.found


def test_learning_rates_of_a_schedule_are_added_up(tmp_path: File) -> None:
    def optimizers(module: TwoLayers) -> Any:
        sgd = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.5, weight_decay=0.1)
        halving = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.5)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": halving, "interval": "step"}}

    module = TwoLayers(optimizers)
    found = recorded(tmp_path, module)
    assert set(found.paths) == {name for name, _ in module.named_parameters()}
    for path in found.paths.values():
        assert (path.optimizer, path.steps, path.weight_decay) == ("SGD", 6, 0.1)
        assert path.rate_sum == pytest.approx(2 * (1 + 0.5 + 0.25 + 0.125 + 0.0625 + 0.03125))
    assert found.damping().on("head.bias") == pytest.approx(0.1 + 2 / 3.9375)


def test_adams_second_moment_is_read_at_the_end(tmp_path: File) -> None:
    made: list[torch.optim.Optimizer] = []

    def optimizers(module: TwoLayers) -> Any:
        made.append(torch.optim.Adam(module.parameters(), lr=0.01))
        return made[0]

    module = TwoLayers(optimizers)
    found = recorded(tmp_path, module)
    for name, parameter in module.named_parameters():
        second = made[0].state[parameter]["exp_avg_sq"] / (1 - 0.999**6)
        assert torch.allclose(found.paths[name].divisor, second.sqrt() + 1e-8)
        expected = 2 * (second.sqrt() + 1e-8) / 0.06
        assert torch.allclose(found.damping().on(name), expected)


def test_parameter_groups_each_have_their_own(tmp_path: File) -> None:
    def optimizers(module: TwoLayers) -> Any:
        groups = [
            {"params": module.backbone.parameters(), "lr": 0.1, "weight_decay": 0.0},
            {"params": module.head.parameters(), "lr": 0.2, "weight_decay": 0.3},
        ]
        return torch.optim.SGD(groups)

    found = recorded(tmp_path, TwoLayers(optimizers))
    assert found.damping().on("backbone.weight") == pytest.approx(2 / 0.6)
    assert found.damping().on("head.weight") == pytest.approx(0.3 + 2 / 1.2)


def test_accumulated_batches_are_one_step(tmp_path: File) -> None:
    module = TwoLayers(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    found = recorded(tmp_path, module, accumulate_grad_batches=3)
    assert found.paths["head.weight"].steps == 2


@pytest.mark.filterwarnings("ignore:.*training_step.* returned .None.*")
def test_a_batch_that_is_skipped_takes_no_step(tmp_path: File) -> None:
    class Skipping(TwoLayers):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    found = recorded(tmp_path, Skipping(lambda m: torch.optim.SGD(m.parameters(), lr=0.1)))
    assert found.paths["head.weight"].steps == 4


def test_a_frozen_parameter_takes_no_step(tmp_path: File) -> None:
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: TwoLayers) -> None:
            pl_module.backbone.weight.requires_grad_(trainer.current_epoch == 1)

    module = TwoLayers(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    module.backbone.bias.requires_grad_(False)
    found = recorded(tmp_path, module, [Unfreeze()])
    assert found.paths["backbone.weight"].steps == 3
    assert found.paths["backbone.weight"].rate_sum == pytest.approx(0.3)
    assert found.paths["head.weight"].steps == 6
    assert "backbone.bias" not in found.paths
    assert found.why_not == ""


def test_a_group_added_in_the_middle_counts_from_there(tmp_path: File) -> None:
    module = TwoLayers(lambda m: torch.optim.SGD(m.head.parameters(), lr=0.1))
    found = recorded(tmp_path, module, [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.02)])
    assert found.paths["backbone.weight"].steps == 3
    assert found.paths["backbone.weight"].rate_sum < found.paths["head.weight"].rate_sum
    assert found.paths["head.weight"].steps == 6


class Manual(TwoLayers):
    """Two optimizers in manual optimization, one of them every second batch."""

    def __init__(self, optimizers: Callable[[TwoLayers], Any], wrapped: bool = True) -> None:
        super().__init__(optimizers)
        self.automatic_optimization = False
        self.wrapped = wrapped

    def training_step(self, batch: Any, batch_idx: int) -> None:
        backbone, head = self.optimizers(use_pl_optimizer=self.wrapped)
        backbone.zero_grad()
        head.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        head.step()
        if batch_idx % 2 == 0:
            backbone.step()


def two(module: TwoLayers) -> Any:
    return [
        torch.optim.SGD(module.backbone.parameters(), lr=0.1),
        torch.optim.AdamW(module.head.parameters(), lr=0.2, weight_decay=0.5),
    ]


def test_several_optimizers_by_hand(tmp_path: File) -> None:
    found = recorded(tmp_path, Manual(two))
    backbone, head = found.paths["backbone.weight"], found.paths["head.weight"]
    assert (backbone.optimizer, backbone.steps, backbone.decoupled) == ("SGD", 4, False)
    assert (head.optimizer, head.steps, head.decoupled) == ("AdamW", 6, True)
    assert "SGD" in found.damping().origin
    assert "AdamW" in found.damping().origin


def test_steps_past_lightning_are_not_seen_and_none_is_made_up(tmp_path: File) -> None:
    found = recorded(tmp_path, Manual(two, wrapped=False))
    assert found.damping() is None
    assert found.why_not == "no step of an optimizer was recorded"


def test_shared_parameters_are_named(tmp_path: File) -> None:
    def optimizers(module: TwoLayers) -> Any:
        return [torch.optim.SGD(module.parameters(), lr=0.1), torch.optim.SGD(module.head.parameters(), lr=0.2)]

    found = recorded(tmp_path, Manual(optimizers))
    assert found.unknown["head.weight"] == "several optimizers trained it"
    assert "backbone.weight" in found.paths
    assert found.damping() is None


def test_another_kind_of_optimizer_is_named(tmp_path: File) -> None:
    found = recorded(tmp_path, TwoLayers(lambda m: torch.optim.Adadelta(m.parameters())))
    assert found.damping() is None
    assert found.why_not.startswith("backbone.weight (and 3 more): Adadelta: optimizer: expected SGD, or")


def test_an_optimizer_that_is_gone_is_named(tmp_path: File) -> None:
    class Swap(Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: TwoLayers) -> None:
            trainer.strategy.optimizers = [torch.optim.SGD(pl_module.head.parameters(), lr=0.1)]

    found = recorded(tmp_path, TwoLayers(lambda m: torch.optim.SGD(m.parameters(), lr=0.1)), [Swap()])
    assert found.unknown["backbone.weight"] == "the optimizer that trained it was gone at the end"


def test_tied_weights_answer_to_both_names(tmp_path: File) -> None:
    class Tied(TwoLayers):
        def __init__(self) -> None:
            super().__init__(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
            self.again = nn.Linear(4, 4)
            self.again.weight = self.backbone.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.again(self.backbone(x))))

    found = recorded(tmp_path, Tied())
    assert found.paths["again.weight"] is found.paths["backbone.weight"]
    assert found.paths["again.weight"].steps == 6


def test_what_is_not_of_the_module_is_passed_over(tmp_path: File) -> None:
    outside = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]

    class Scaled(TwoLayers):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * outside[0].sum() * outside[1].sum()

    module = Scaled(lambda m: torch.optim.SGD([*outside, *m.parameters()], lr=0.1))
    found = recorded(tmp_path, module)
    assert set(found.paths) == {name for name, _ in module.named_parameters()}


def test_a_resumed_run_goes_on_counting(tmp_path: File) -> None:
    def module() -> TwoLayers:
        return TwoLayers(lambda m: torch.optim.Adam(m.parameters(), lr=0.01))

    first, second = Recording(), Recording()
    fit = trainer(tmp_path, callbacks=[first], max_epochs=1, logger=False)
    fit.fit(module(), data())
    fit.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, callbacks=[second], max_epochs=3, logger=False).fit(
        module(), data(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert first.found.paths["head.weight"].steps == 3
    assert second.found.paths["head.weight"].steps == 9
    assert second.found.paths["head.weight"].rate_sum == pytest.approx(0.09)


def test_another_module_starts_anew_and_the_same_goes_on(tmp_path: File) -> None:
    recording = Recording()

    def fit(module: L.LightningModule) -> tuple[int, float]:
        options = {"logger": False, "enable_checkpointing": False}
        trainer(tmp_path, callbacks=[recording], **options).fit(module, data())
        path = recording.found.paths["head.weight"]
        return path.steps, round(path.rate_sum, 6)

    one, other = (TwoLayers(lambda m: torch.optim.SGD(m.parameters(), lr=0.1)) for _ in range(2))
    assert fit(one) == (6, 0.6)
    assert fit(one) == (12, 1.2)
    assert fit(other) == (6, 0.6)


def test_training_is_the_same_with_and_without(tmp_path: File) -> None:
    def weights(callbacks: list[Callback]) -> tuple[list[Tensor], Tensor]:
        L.seed_everything(1, verbose=False)
        module = Net()
        train, _ = loaders()
        trainer(tmp_path, callbacks=callbacks, logger=False, enable_checkpointing=False).fit(module, train)
        return list(module.state_dict().values()), torch.get_rng_state()

    plain, state = weights([])
    watched, after = weights([Recording()])
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert torch.equal(state, after)
