"""Maps, sequences, masks and odd outputs become the features that the choice says."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_interp import similarity
from lightning_interp.network.layout import Layout, layout_of
from lightning_interp.similarity.pooling import Pooling, feature_count, pool


def read(part: nn.Module, output: Any, n: int, mask: Tensor | None = None, **choice: Any) -> Tensor:
    layout = layout_of(part, output, n)
    assert layout is not None
    found = pool(output, layout, Pooling(**choice), mask)
    assert found.shape[1] == feature_count(layout, Pooling(**choice))
    return found


def test_maps() -> None:
    x = torch.randn(5, 3, 8, 6)
    conv = nn.Conv2d(1, 3, 1)
    assert torch.equal(read(conv, x, 5), x.flatten(1))
    assert torch.allclose(read(conv, x, 5, maps="pool"), x.mean((2, 3)), atol=1e-6)
    positions = read(conv, x, 5, maps="positions")
    assert positions.shape == (5 * 16, 3)
    assert torch.equal(positions[0], x[0, :, 1, 0])
    assert torch.equal(positions[-1], x[-1, :, 7, 5])
    small = torch.randn(5, 3, 2, 2)
    assert torch.equal(read(conv, small, 5, maps="positions"), small.permute(0, 2, 3, 1).reshape(20, 3))


def test_channels_are_where_the_layer_puts_them() -> None:
    x = torch.randn(5, 4, 4, 7)
    assert torch.allclose(read(nn.LayerNorm(7), x, 5, maps="pool"), x.mean((1, 2)), atol=1e-6)
    assert torch.allclose(read(nn.Conv1d(1, 4, 1), x[:, 0], 5, maps="pool"), x[:, 0].mean(2), atol=1e-6)
    assert torch.allclose(read(nn.Sequential(nn.Linear(7, 7), nn.ReLU()), x[:, 0], 5), x[:, 0].mean(1), atol=1e-6)
    assert read(nn.ReLU(), x, 5, maps="pool").shape == (5, 4)


def test_tokens_and_masks() -> None:
    x = torch.randn(3, 20, 4)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, 5:] = False
    expected = torch.stack([x[0].mean(0), x[1, :5].mean(0), x[2].mean(0)])
    part = nn.Linear(4, 4)
    assert torch.allclose(read(part, x, 3, mask), expected, atol=1e-6)
    assert torch.allclose(read(part, x, 3, mask[:, :7]), x.mean(1), atol=1e-6), "another length: no mask of these"
    assert torch.equal(read(part, x, 3, mask, tokens="cls"), x[:, 0])
    assert torch.equal(read(part, x, 3, tokens="flatten"), x.flatten(1))
    positions = read(part, x, 3, mask, tokens="positions")
    assert positions.shape == (16 + 5 + 16, 4)
    assert torch.equal(positions[16:21], x[1, :5])


def test_recurrent_outputs() -> None:
    x = torch.randn(3, 6, 4)
    first, second = nn.LSTM(4, 5, batch_first=True), nn.GRU(4, 5)
    output = first(x)
    assert torch.allclose(read(first, output, 3), output[0].mean(1), atol=1e-6)
    turned = second(x.transpose(0, 1))
    assert torch.allclose(read(second, turned, 3), turned[0].mean(0), atol=1e-6)
    lengths = torch.tensor([6, 2, 3])
    packed = first(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    expected = torch.stack([output[0][i, :length].mean(0) for i, length in enumerate(lengths.tolist())])
    assert torch.allclose(read(first, packed, 3), expected, atol=1e-6)


def test_dicts_tuples_and_what_is_no_feature() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(read(nn.Identity(), OrderedDict(hidden=x, other=x + 1), 3), x)
    assert torch.equal(read(nn.Identity(), (x, "more"), 3), x)
    for output in (torch.zeros(()), torch.zeros(3, 2, dtype=torch.long), torch.zeros(4, 2), "text", torch.zeros(3)):
        assert layout_of(nn.Identity(), output, 3) is None


def test_the_choice_is_in_the_tag(unchecked: None) -> None:
    assert Pooling().tag == ""
    assert Pooling("pool", "cls").tag == "_maps_pool_tokens_cls"
    with pytest.raises(ValueError, match="maps: expected one of flatten, pool, positions, got 'average'"):
        Pooling("average")  # type: ignore[arg-type]
    assert feature_count(Layout("map", True, False, (3, 8, 8)), Pooling("pool")) == 3


def test_means_of_half_precision_outputs_are_taken_in_float32() -> None:
    x = (torch.randn(3, 500, 4) + 30).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = read(nn.Linear(4, 4), x, 3)
    assert found.dtype is torch.float32
    assert torch.allclose(found, x.float().mean(1), atol=1e-4)


def test_the_class_token_is_the_first_that_counts() -> None:
    x, part = torch.randn(2, 4, 3), nn.Linear(3, 3)
    left_padded = torch.tensor([[False, False, True, True], [True, True, True, True]])
    assert torch.equal(read(part, x, 2, left_padded, tokens="cls"), torch.stack([x[0, 2], x[1, 0]]))
    assert torch.equal(read(part, x, 2, left_padded[:, 1:], tokens="cls"), x[:, 0])


def test_the_earlier_name_still_works() -> None:
    assert similarity.Reading is similarity.Pooling
    assert {"Pooling", "Reading"} <= set(similarity.__all__)
