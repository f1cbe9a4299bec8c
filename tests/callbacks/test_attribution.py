"""What the attribution callback draws, and when."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_interp import Display, InputAttribution, panels
from lightning_interp.attribution import GradCAM, Saliency
from lightning_interp.records import Shown
from tests.models import Net, Shapes, loaders, trainer


def film(fit: L.Trainer, tag: str) -> dict[int, np.ndarray]:
    fit.logger.finalize("success")
    events = EventAccumulator(fit.log_dir, size_guidance={"images": 0}).Reload()
    return {e.step: np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in events.Images(tag)}


def test_a_frame_before_training_and_after_each_validation(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=3, callbacks=[InputAttribution(samples=2)])
    fit.fit(Net(), *loaders())
    for method in ("GradCAM", "Saliency"):
        for sample in (0, 11):
            frames = film(fit, f"attribution/{method}/{sample}")
            assert sorted(frames) == [0, 3, 6, 9]
            assert not np.array_equal(frames[0], frames[9])
            left = slice(2 * panels.LINE + 4, None), slice(0, panels.SIDE)
            assert np.array_equal(frames[0][left], frames[9][left])


def test_the_panel_shows_this_samples_map_and_prediction(tmp_path: Path) -> None:
    module = Net()
    fit = trainer(tmp_path, max_epochs=1, callbacks=[InputAttribution([Saliency()], samples=3)])
    fit.fit(module, *loaders())
    data = Shapes(12, seed=1)
    images = torch.stack([data[i][0] for i in (0, 6, 11)])
    logits = module.eval()(images)
    maps = Saliency()(module, images, logits.argmax(1)).maps
    for place, index in enumerate((0, 6, 11)):
        said = str(int(logits[place].argmax()))
        chance = float(logits[place].softmax(0).max().detach())
        shown = Shown(str(index), images[place], str(int(data[index][1])), said, chance)
        title = f"Saliency of {said}, epoch 1"
        expected = panels.attribution_panel(shown, maps[place], title, Display())
        found = film(fit, f"attribution/Saliency/{index}")[3].astype(int)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 4


def test_named_layers_are_checked_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GradCAM_conv7\(layer=...\): 'conv7' names no layer"):
        trainer(tmp_path, callbacks=[InputAttribution([GradCAM("conv7")])]).fit(Net(), *loaders())
    with pytest.raises(ValueError, match=r"layer='head': expected an output"):
        trainer(tmp_path, callbacks=[InputAttribution([GradCAM("head")])]).fit(Net(), *loaders())


def test_names_and_classes_of_the_display(tmp_path: Path) -> None:
    display = Display(class_names=["left", "right", "low"], sample_id=lambda i: f"img/{i}.png")
    fit = trainer(tmp_path, max_epochs=1, callbacks=[InputAttribution([Saliency()], samples=1, display=display)])
    fit.fit(Net(), *loaders())
    assert film(fit, "attribution/Saliency/img/0.png")


def test_several_validations_an_epoch_and_validate_afterwards(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=1, val_check_interval=1, callbacks=[InputAttribution([Saliency()], samples=1)])
    module: Any = Net()
    fit.fit(module, *loaders())
    fit.validate(module, loaders()[1], verbose=False)
    assert sorted(film(fit, "attribution/Saliency/0")) == [0, 1, 2, 3]
