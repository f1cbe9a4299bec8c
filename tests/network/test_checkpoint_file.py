"""Checkpoint files of every kind, from a local path or an fsspec address."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_interp.network.checkpoint_file import checkpoint_content
from lightning_interp.network.weights import check_checkpoints, loaded


def weights(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((2, 3), value), "bias": torch.full((2,), value)}


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("name", ["lightning.ckpt", "torch_save.pt", "weights.safetensors"])
def test_each_kind_of_file_fills_the_network(name: str, place: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name == "weights.safetensors":
        save_file(weights(2.0), file)
    else:
        torch.save({"state_dict": weights(2.0), "epoch": 3} if name == "lightning.ckpt" else weights(2.0), file)
    address = str(file)
    if place == "memory":
        address = f"memory://checkpoints/{name}"
        with fsspec.open(address, "wb") as remote:
            remote.write(file.read_bytes())
    net = nn.Linear(3, 2)
    check_checkpoints("Estimator(checkpoints=...)", [address])
    with loaded(net, address):
        assert (net.weight == 2).all()
        assert (net.bias == 2).all()
    assert not (net.weight == 2).any()


def test_a_lightning_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    torch.save({"state_dict": weights(2.0), "epoch": 3}, tmp_path / "last.ckpt")
    content = checkpoint_content(tmp_path / "last.ckpt")
    assert content["epoch"] == 3
    assert torch.equal(content["state_dict"]["bias"], weights(2.0)["bias"])


def test_more_than_tensors_needs_trust(tmp_path: Path) -> None:
    torch.save({"state_dict": weights(2.0), "layer": nn.Linear(2, 2)}, tmp_path / "more.ckpt")
    with pytest.raises(ValueError, match=r"^checkpoint: .*got torch.nn.modules.linear.Linear too.*load it yourself"):
        checkpoint_content(tmp_path / "more.ckpt")
    with pytest.raises(ValueError, match="use --trust"):
        checkpoint_content(tmp_path / "more.ckpt", remedy="use --trust")
    assert isinstance(checkpoint_content(tmp_path / "more.ckpt", trusted=True)["layer"], nn.Linear)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.ckpt", b"no checkpoint", "text.ckpt is no file that torch.load can read"),
        ("empty.pt", b"", "empty.pt is no file that torch.load can read"),
        ("cut.safetensors", b"123", "cut.safetensors is no file that safetensors can read"),
    ],
)
def test_files_of_another_format_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^checkpoint: .*{message}"):
        checkpoint_content(tmp_path / name)


def test_a_list_is_no_state_dict(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"^checkpoint: expected a state dict in .*got list"):
        checkpoint_content(tmp_path / "list.pt")


@pytest.mark.parametrize("address", ["nowhere.ckpt", "nowhere.safetensors", "memory://nowhere.pt", "."])
def test_a_missing_file_is_named(address: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"^checkpoint: expected a file, found none at"):
        checkpoint_content(address)
    with pytest.raises(FileNotFoundError, match="expected a checkpoint file"):
        check_checkpoints("Estimator(checkpoints=...)", [address])
