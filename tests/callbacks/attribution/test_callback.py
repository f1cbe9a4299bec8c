"""What the attribution callback draws and measures, and when."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_interp import Display, InputAttribution, Task
from lightning_interp.attribution import (
    LIME,
    DeletionArea,
    GradCAM,
    Grid,
    PointingGame,
    Saliency,
    rank_correlation,
    sanity_similarity,
)
from lightning_interp.views.attribution import TitledMap, attribution_panel
from lightning_interp.views.canvas import GAP, LINE, SIDE
from lightning_interp.views.display import SampleView
from tests.models import Net, Shapes, loaders, trainer


def events_of(fit: L.Trainer) -> EventAccumulator:
    fit.logger.finalize("success")
    return EventAccumulator(fit.log_dir, size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()


def film(fit: L.Trainer, tag: str) -> dict[int, np.ndarray]:
    return {e.step: np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in events_of(fit).Images(tag)}


def curve(fit: L.Trainer, tag: str) -> dict[int, float]:
    return {e.step: e.value for e in events_of(fit).Scalars(tag)}


def inputs_at(places: Any) -> tuple[Tensor, Tensor]:
    data = Shapes(12, seed=1)
    return torch.stack([data[i][0] for i in places]), torch.stack([data[i][1] for i in places])


def fitted(folder: Path, callback: InputAttribution, epochs: int = 2, **options: Any) -> tuple[L.Trainer, Net]:
    fit, module = trainer(folder, max_epochs=epochs, callbacks=[callback], **options), Net()
    fit.fit(module, *loaders())
    return fit, module.eval()


def test_a_frame_before_training_and_after_each_validation(tmp_path: Path) -> None:
    fit, _ = fitted(tmp_path, InputAttribution(samples=2), epochs=3)
    for method in ("GradCAM", "Saliency"):
        for sample in (0, 11):
            frames = film(fit, f"attribution/{method}/{sample}")
            assert sorted(frames) == [0, 3, 6, 9]
            assert not np.array_equal(frames[0], frames[9])
            left = slice(3 * LINE + 4, None), slice(0, SIDE)
            assert np.array_equal(frames[0][left], frames[9][left])


def test_the_panel_shows_this_samples_map_and_its_likeliest_classes(tmp_path: Path) -> None:
    fit, module = fitted(tmp_path, InputAttribution([Saliency()], samples=3), epochs=1)
    images, labels = inputs_at((0, 6, 11))
    logits = module(images)
    maps = Saliency()(module, images, logits.argmax(1)).maps
    before = {index: film(fit, f"attribution/Saliency/{index}")[0] for index in (0, 6, 11)}
    for place, index in enumerate((0, 6, 11)):
        chances = logits[place].softmax(0).detach()
        order = chances.argsort(descending=True)
        likeliest = tuple((str(int(c)), float(chances[c])) for c in order)
        shown = SampleView(str(index), images[place], str(int(labels[place])), likeliest[0][0], likeliest[0][1])
        shown = SampleView(shown.id, shown.value, shown.label, shown.prediction, shown.probability, False, likeliest)
        title = f"Saliency of {shown.prediction}, epoch 1"
        found = film(fit, f"attribution/Saliency/{index}")[3].astype(int)
        # The scale also knows the frame before training, whose map was smaller here.
        top = float(maps[place].abs().max())
        expected = attribution_panel(shown, [TitledMap("", maps[place])], title, Display(), top)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 4
        assert not np.array_equal(before[index], found)


def test_maps_of_the_three_likeliest_classes(tmp_path: Path) -> None:
    fit, _ = fitted(tmp_path, InputAttribution([Saliency(), LIME(60, parts=Grid(4))], samples=1, classes=3), epochs=1)
    for method in ("Saliency", f"{LIME(60, parts=Grid(4)).name}"):
        wide = film(fit, f"attribution/{method}/0")[3].shape[1]
        assert wide > 4 * SIDE + 3 * GAP


@pytest.mark.parametrize("target", ["label", 2, lambda outputs: outputs.sum(1)], ids=["label", "index", "function"])
def test_what_is_explained_can_be_chosen(tmp_path: Path, target: Any) -> None:
    fit, module = fitted(tmp_path, InputAttribution([Saliency()], samples=2, target=target, wrong=0), epochs=1)
    images, labels = inputs_at((0, 11))
    chosen = {"label": labels, 2: torch.tensor([2, 2])}.get(target, target) if not callable(target) else target
    largest = Saliency()(module, images, chosen).maps.abs().flatten(1).max(1).values
    stored = fit.callbacks[0]._run.store.read(3).maps["Saliency"]
    assert torch.allclose(stored.flatten(1).max(1).values, largest, rtol=2e-3)


def test_the_label_of_what_has_none_is_refused(tmp_path: Path) -> None:
    class Regression(Net):
        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.mse_loss(self(batch[0])[:, 0], batch[1].float() / 2)

    task = Task(targets=lambda batch: batch[1] / 2, outputs=lambda module, x: module(x)[:, 0])
    with pytest.raises(ValueError, match='target="label": expected one class per sample'):
        trainer(tmp_path, callbacks=[InputAttribution(target="label", task=task)]).fit(Regression(), *loaders())


def test_drift_is_of_maps_for_a_target_that_stays(tmp_path: Path) -> None:
    fit, module = fitted(tmp_path, InputAttribution([Saliency()], samples=3), epochs=3)
    images, labels = inputs_at((0, 6, 11))
    store = fit.callbacks[0]._run.store
    looks = [store.read(step).maps["Saliency"] for step in (0, 3, 6, 9)]
    final = Saliency()(module, images, labels).maps.abs().amax(1)
    assert torch.allclose(looks[-1], final, atol=2e-3 * float(final.max()))
    to_previous, to_final = (curve(fit, f"attribution_drift/Saliency/{which}") for which in ("to_previous", "to_final"))
    assert sorted(to_previous) == [3, 6, 9]
    assert sorted(to_final) == [0, 3, 6, 9]
    for step, earlier, later in zip((3, 6, 9), looks, looks[1:], strict=False):
        assert to_previous[step] == pytest.approx(
            float(rank_correlation(earlier, later).mean()), abs=2e-3
        )  # stored in half precision
    assert to_final[3] == pytest.approx(float(rank_correlation(looks[-1], looks[1]).mean()), abs=1e-5)
    assert to_final[9] == pytest.approx(1)


def test_the_film_is_on_one_scale(tmp_path: Path) -> None:
    fit, _ = fitted(tmp_path, InputAttribution([GradCAM()], samples=1), epochs=3)
    (strip,) = film(fit, "attribution_film/GradCAM/0").values()
    assert strip.shape[1] >= 5 * 112 + 4 * GAP
    assert (Path(fit.log_dir) / "interp/attribution/film-GradCAM-0.png").exists()


def test_the_most_confidently_wrong_are_shown(tmp_path: Path) -> None:
    fit, module = fitted(tmp_path, InputAttribution([Saliency()], samples=1, wrong=2), epochs=1)
    images, labels = inputs_at(range(12))
    chances, chosen = module(images).softmax(1).max(1)
    worst = torch.where(chosen != labels, chances, -torch.ones(12)).argsort(descending=True)
    assert int((chosen != labels).sum()) >= 2, "the test needs a network that errs"
    first = film(fit, "attribution_wrong/Saliency/1")[3]
    place = int(worst[0])
    left = slice(3 * LINE + 4, 3 * LINE + 4 + SIDE), slice(0, SIDE)
    pixels = first[left][:: SIDE // 8, :: SIDE // 8, 0][:8, :8] / 255
    assert np.abs(pixels - images[place, 0].numpy()).max() < 0.05
    assert sorted(film(fit, "attribution_wrong/Saliency/2")) == [3]


def test_trust_is_measured_every_so_many_epochs_and_at_the_end(tmp_path: Path) -> None:
    callback = InputAttribution([Saliency()], samples=3, scored=2, score_every_n_epochs=2)
    fit, module = fitted(tmp_path, callback, epochs=3)
    images, labels = inputs_at((0, 6))
    maps = Saliency()(module, images, labels).maps
    area = DeletionArea()
    area.update(module, images, maps, labels)
    found = curve(fit, "attribution_deletion/Saliency")
    assert sorted(found) == [6, 9]
    assert found[9] == pytest.approx(float(area.compute()), abs=1e-5)
    sanity = float(sanity_similarity(Saliency(), module, images, labels).mean())
    assert curve(fit, "attribution_sanity/Saliency")[9] == pytest.approx(sanity, abs=1e-5)
    assert sorted(curve(fit, "attribution_insertion/Edges")) == [6, 9]
    assert sorted(curve(fit, "attribution_deletion/Centre")) == [6, 9]
    assert curve(fit, "attribution_dead/Saliency")[9] == 0


def halves(batch: Any) -> Tensor:
    masks = torch.zeros(len(batch[0]), 8, 8, dtype=torch.bool)
    masks[:, :, 4:] = True
    return masks


def test_a_given_truth_is_measured_against(tmp_path: Path) -> None:
    fit, module = fitted(tmp_path, InputAttribution([GradCAM()], samples=1, truth=halves, truth_samples=12), epochs=1)
    images, labels = inputs_at(range(12))
    game = PointingGame()
    game.update(GradCAM()(module, images, labels).maps, halves((images, labels)))
    found = curve(fit, "attribution_localization/GradCAM/pointing_game")
    assert sorted(found) == [0, 3]
    assert found[3] == pytest.approx(float(game.compute()))
    assert "attribution_localization/Edges/error_at_0.2" in events_of(fit).Tags()["scalars"]


def test_a_truth_of_another_size_is_refused_before_training(tmp_path: Path) -> None:
    callback = InputAttribution([GradCAM()], truth=lambda batch: torch.ones(len(batch[0]), 4, 4))
    with pytest.raises(ValueError, match=r"truth: expected masks \(n, 8, 8\) or boxes"):
        fitted(tmp_path, callback)


def test_all_numbers_are_in_the_runs_folder(tmp_path: Path) -> None:
    fit, _ = fitted(tmp_path, InputAttribution([Saliency()], samples=2), epochs=2)
    written = (Path(fit.log_dir) / "interp/attribution/scores.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(written)))
    held = {(int(row["step"]), row["tag"]): float(row["value"]) for row in rows}
    events = events_of(fit)
    logged = {
        (e.step, tag): e.value
        for tag in events.Tags()["scalars"]
        if tag.startswith("attribution_")
        for e in events.Scalars(tag)
    }
    assert held.keys() == logged.keys()
    assert all(held[key] == pytest.approx(value, abs=1e-4, nan_ok=True) for key, value in logged.items())


def test_named_layers_are_checked_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GradCAM_conv7\(layer=...\): 'conv7' names no layer"):
        trainer(tmp_path, callbacks=[InputAttribution([GradCAM("conv7")])]).fit(Net(), *loaders())
    with pytest.raises(ValueError, match=r"layer='head': expected an output"):
        trainer(tmp_path, callbacks=[InputAttribution([GradCAM("head")])]).fit(Net(), *loaders())
    fitted(tmp_path, InputAttribution([GradCAM("conv2>relu")], samples=1, on_error="raise"), epochs=1)


def test_names_and_classes_of_the_display(tmp_path: Path) -> None:
    display = Display(class_names=["left", "right", "low"], sample_id=lambda i: f"img/{i}.png")
    fit, _ = fitted(tmp_path, InputAttribution([Saliency()], samples=1, display=display), epochs=1)
    assert film(fit, "attribution/Saliency/img/0.png")


def test_several_validations_an_epoch_and_evaluations_afterwards(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=1, val_check_interval=1, callbacks=[InputAttribution([Saliency()], samples=1)])
    module: Any = Net()
    data = loaders()
    fit.fit(module, *data)
    fit.validate(module, data[1], verbose=False)
    fit.test(module, data[1], verbose=False)
    assert sorted(film(fit, "attribution/Saliency/0")) == [0, 1, 2, 3]
    assert sorted(film(fit, "attribution_validate/Saliency/0")) == [3]
    assert sorted(film(fit, "attribution_test/Saliency/0")) == [3]


def test_evaluation_without_a_fit(tmp_path: Path) -> None:
    fit = trainer(tmp_path, callbacks=[InputAttribution(samples=2, on_error="raise")])
    fit.test(Net(), loaders()[1], verbose=False)
    assert film(fit, "attribution_test/GradCAM/11")


def test_a_resumed_run_goes_on_with_its_maps_and_numbers(tmp_path: Path) -> None:
    fit, _ = fitted(tmp_path / "a", InputAttribution([Saliency()], samples=2), epochs=2)
    fit.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    again = trainer(tmp_path / "b", max_epochs=4, callbacks=[InputAttribution([Saliency()], samples=2)])
    again.fit(Net(), *loaders(), ckpt_path=tmp_path / "half.ckpt")
    assert again.callbacks[0]._run.store.steps == [0, 3, 6, 9, 12]
    first, second = (run.callbacks[0]._run.store.read(3).maps["Saliency"] for run in (fit, again))
    assert torch.allclose(first, second, rtol=1e-3)
    assert sorted(curve(again, "attribution_drift/Saliency/to_final")) == [0, 3, 6, 9, 12]
    assert {n.step for n in again.callbacks[0]._run.numbers} == {0, 3, 6, 9, 12}


def test_maps_thin_to_stay_in_the_budget(tmp_path: Path) -> None:
    fit, _ = fitted(tmp_path, InputAttribution([Saliency()], samples=4, budget_mb=0.002), epochs=5)
    steps = fit.callbacks[0]._run.store.steps
    assert steps[0] == 0
    assert steps[-1] == 15
    assert len(steps) < 6


class Photos(Dataset):
    """Images of different sizes."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, 8 + index, 10, generator=generator), torch.tensor(index % 3)


class OfLists(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.head(torch.cat([self.conv(image[None]).relu().mean((2, 3)) for image in images]))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def listed(samples: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
    return [image for image, _ in samples], torch.stack([label for _, label in samples])


def test_images_of_different_sizes_in_a_list(tmp_path: Path) -> None:
    data = DataLoader(Photos(), 4, collate_fn=listed)
    fit = trainer(tmp_path, max_epochs=1, callbacks=[InputAttribution(samples=3, on_error="raise")])
    fit.fit(OfLists(), data, data)
    assert film(fit, "attribution/GradCAM/7")
    assert film(fit, "attribution/Saliency/0")


def test_lists_of_images_that_happen_to_be_of_one_size(tmp_path: Path) -> None:
    class Alike(Photos):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            generator = torch.Generator().manual_seed(index)
            return torch.rand(3, 8, 10, generator=generator), torch.tensor(index % 3)

    data = DataLoader(Alike(), 4, collate_fn=listed)
    fit = trainer(tmp_path, max_epochs=1, callbacks=[InputAttribution(samples=3, on_error="raise")])
    fit.fit(OfLists(), data, data)
    assert film(fit, "attribution/GradCAM/0")


def test_a_network_with_an_answer_for_each_pixel(tmp_path: Path) -> None:
    class Segmenting(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.conv1(x))

        def training_step(self, batch: Any, _: int) -> Tensor:
            maps = self(batch[0])
            return F.cross_entropy(maps, batch[1][:, None, None].expand(-1, *maps.shape[2:]))

        def validation_step(self, batch: Any, _: int) -> None:
            pass

    task = Task(targets=lambda batch: batch[1][:, None, None].expand(-1, 3, 3))
    callback = InputAttribution(samples=2, task=task, on_error="raise")
    fit = trainer(tmp_path, max_epochs=1, callbacks=[callback])
    fit.fit(Segmenting(), *loaders())
    assert film(fit, "attribution/GradCAM/0")
    assert not callable(callback._run.targets[0])


def test_two_callbacks_of_this_kind_keep_apart(tmp_path: Path) -> None:
    callbacks = [InputAttribution([Saliency()], samples=2), InputAttribution([Saliency()], samples=1, target="label")]
    fit = trainer(tmp_path, max_epochs=1, callbacks=callbacks)
    fit.fit(Net(), *loaders())
    assert sorted(film(fit, "attribution/Saliency/0")) == sorted(film(fit, "attribution-2/Saliency/0")) == [0, 3]
    assert len(events_of(fit).Scalars("attribution_dead/Saliency")) == 2
    assert len(events_of(fit).Scalars("attribution-2_dead/Saliency")) == 2
    assert (Path(fit.log_dir) / "interp/attribution-2/scores.csv").exists()


def test_two_callbacks_of_this_kind_keep_apart_without_a_fit(tmp_path: Path) -> None:
    callbacks = [
        InputAttribution([Saliency()], samples=samples, target=target, on_error="raise")
        for samples, target in ((2, "predicted"), (1, "label"))
    ]
    fit = trainer(tmp_path, callbacks=callbacks)
    fit.validate(Net(), loaders()[1], verbose=False)
    tags = events_of(fit).Tags()
    assert sorted(tag for tag in tags["images"] if tag.startswith("attribution")) == [
        "attribution-2_validate/Saliency/0",
        "attribution_validate/Saliency/0",
        "attribution_validate/Saliency/11",
    ]
    assert {"interp_seconds/InputAttribution", "interp_seconds/InputAttribution-2"} <= set(tags["scalars"])


class AlwaysRight(Net):
    """Answers with the brightest of the three corners, and notes of how many samples each forward is."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.append(len(x))
        features = F.relu(x + 0 * self.conv1(x))  # a map for Grad-CAM, whatever is trained
        return torch.stack(
            [features[:, :, r : r + 4, c : c + 4].mean((1, 2, 3)) for r, c in ((0, 0), (0, 4), (4, 0))], 1
        )


class CountsForwards(InputAttribution):
    """Notes the forwards of each evaluation."""

    def __init__(self, **options: Any) -> None:
        super().__init__(samples=8, wrong=0, scored=0, on_error="raise", **options)
        self.evaluations: list[list[int]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        before = len(pl_module.forwards)
        super().on_validation_end(trainer, pl_module)
        self.evaluations.append(pl_module.forwards[before:])


@pytest.mark.parametrize("mislabelled", [(), (0, 11)])
def test_an_evaluation_is_one_forward_and_one_more_of_what_is_answered_wrongly(
    mislabelled: tuple[int, ...], tmp_path: Path
) -> None:
    shapes = Shapes(12, seed=1)
    for index in mislabelled:
        shapes.labels[index] = (shapes.labels[index] + 1) % 3
    callback = CountsForwards()
    fit = trainer(tmp_path, max_epochs=2, callbacks=[callback], num_sanity_val_steps=0)
    fit.fit(AlwaysRight(), loaders()[0], DataLoader(shapes, 6))
    assert sorted(callback._run.setup.methods) == ["GradCAM", "Saliency"]
    assert callback.evaluations == [[6, 2, *(1 for _ in mislabelled)]] * 2


def first_output(outputs: Tensor) -> Tensor:
    return outputs[:, 0]


def test_a_resumed_run_knows_its_function_again(tmp_path: Path) -> None:
    fit, _ = fitted(tmp_path / "a", InputAttribution([Saliency()], samples=2, target=first_output), epochs=1)
    fit.save_checkpoint(tmp_path / "half.ckpt")
    callback = InputAttribution([Saliency()], samples=2, target=first_output)
    trainer(tmp_path / "b", max_epochs=2, callbacks=[callback]).fit(Net(), *loaders(), ckpt_path=tmp_path / "half.ckpt")
    assert callback._run.store.steps == [0, 3, 6]


def test_scored_samples_may_be_in_several_batches(tmp_path: Path) -> None:
    callback = InputAttribution([Saliency()], samples=3, scored=3)
    fit, module = trainer(tmp_path, max_epochs=1, callbacks=[callback]), Net()
    train, _ = loaders()
    fit.fit(module, train, DataLoader(Shapes(12, seed=1), 2))
    images, labels = inputs_at((0, 6, 11))
    area = DeletionArea()
    area.update(module.eval(), images, Saliency()(module, images, labels).maps, labels)
    assert curve(fit, "attribution_deletion/Saliency")[3] == pytest.approx(float(area.compute()), abs=1e-5)


def test_looks_within_an_epoch_are_named_by_their_step_and_measured_once(tmp_path: Path) -> None:
    callback = InputAttribution([Saliency()], samples=2, score_every_n_epochs=1)
    fit, _ = fitted(tmp_path, callback, epochs=2, val_check_interval=1)
    epochs = {number.step: number.epoch for number in callback._run.numbers}
    assert epochs == {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2}
    events = events_of(fit)
    assert [e.step for e in events.Scalars("attribution_deletion/Saliency")] == [3, 6]
    assert [e.step for e in events.Scalars("attribution_dead/Saliency")] == [0, 1, 2, 3, 4, 5, 6]


class Grey(Dataset):
    """Images without a channel."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = Shapes(12)[index]
        return image[0], label


class OfGrey(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, None])


def test_grey_images_without_a_channel(tmp_path: Path) -> None:
    data = DataLoader(Grey(), 4)
    callback = InputAttribution([GradCAM(), Saliency()], samples=2, truth=halves, truth_samples=4, on_error="raise")
    fit = trainer(tmp_path, max_epochs=1, callbacks=[callback])
    fit.fit(OfGrey(), data, data)
    assert callback._run.store.read(3).maps["GradCAM"].shape == (2, 8, 8)
    assert "attribution_localization/GradCAM/pointing_game" in events_of(fit).Tags()["scalars"]
