"""Attention's projections written out: the same outputs as torch's own, and autograd's gradients for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_interp.influence.gradients.rules import RULES, LayerCall
from lightning_interp.network.undisturbed import differentiable
from tests.influence.nets import per_sample

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
LABELS = torch.tensor([0, 1, 2, 1, 0])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(3)


class Attends(nn.Module):
    """Attention of three positions to themselves, or to two others of another width."""

    def __init__(self, layer: nn.MultiheadAttention, cross: bool = False, **options: Any) -> None:
        super().__init__()
        self.layer, self.cross, self.options, self.out = layer, cross, options, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        query = x[:, :18].unflatten(1, (3, 6))
        key = x[:, 8:].unflatten(1, (2, 5)) if self.cross else query
        value = x[:, 4:12].unflatten(1, (2, 4)) if self.cross else query
        if not self.layer.batch_first:
            query, key, value = (side.transpose(0, 1) for side in (query, key, value))
        output, weights = self.layer(query, key=key, value=value, **self.options)
        pooled = self.out(output.mean(1 if self.layer.batch_first else 0))
        return pooled if weights is None else pooled + weights.flatten(1).square().sum(1, keepdim=True) * x[:, :3]


class Encodes(nn.Module):
    """A transformer's encoder, the last position of some samples masked."""

    def __init__(self, batch_first: bool, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 7, batch_first=batch_first, norm_first=norm_first)
        self.encoder, self.out = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(6, 3)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        steps = x.unflatten(1, (3, 6))
        masked = torch.zeros(len(x), 3, dtype=torch.bool)
        masked[:, 2] = x[:, 0] > 0
        steps = steps if self.batch_first else steps.transpose(0, 1)
        output = self.encoder(steps, src_key_padding_mask=masked)
        return self.out(output[:, 0] if self.batch_first else output[0])


class Translates(nn.Module):
    """A whole transformer, its decoder causal."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.whole = nn.Transformer(6, 2, 1, 1, 7, batch_first=batch_first)
        self.out, self.batch_first = nn.Linear(6, 3), batch_first

    def forward(self, x: Tensor) -> Tensor:
        source, target = x[:, :12].unflatten(1, (2, 6)), x.unflatten(1, (3, 6))
        if not self.batch_first:
            source, target = source.transpose(0, 1), target.transpose(0, 1)
        output = self.whole(source, target, tgt_mask=CAUSAL.to(x.dtype), tgt_is_causal=True)
        return self.out(output.mean(1 if self.batch_first else 0))


def itself(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(6, 2, **options)


NETS: dict[str, Callable[[], nn.Module]] = {
    "itself": lambda: Attends(itself(batch_first=True)),
    "itself, sequence first, no weights": lambda: Attends(itself(), need_weights=False),
    "itself, no bias, zero attention": lambda: Attends(itself(bias=False, add_zero_attn=True, batch_first=True)),
    "itself, causal": lambda: Attends(
        itself(batch_first=True), attn_mask=CAUSAL.double(), is_causal=True, need_weights=False
    ),
    "others": lambda: Attends(itself(kdim=5, vdim=4, batch_first=True), cross=True, average_attn_weights=False),
    "others, sequence first, no bias": lambda: Attends(itself(kdim=5, vdim=4, bias=False), cross=True),
    "encoder": lambda: Encodes(batch_first=True),
    "encoder, sequence first, norm first": lambda: Encodes(batch_first=False, norm_first=True),
    "transformer": lambda: Translates(batch_first=True),
    "transformer, sequence first": lambda: Translates(batch_first=False),
}


def shaken(net: nn.Module) -> nn.Module:
    """Move biases away from the zeros they start from."""
    for parameter in net.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.5)
    return net


@pytest.mark.parametrize("name", NETS)
def test_equals_autograd_sample_by_sample(name: str) -> None:
    net = shaken(NETS[name]().double())
    coverage, worst = per_sample(net, (torch.randn(5, 18, dtype=torch.float64), LABELS))
    assert worst < 1e-10
    assert coverage.left_out == {}
    assert coverage.fallback is None
    assert coverage.size == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", ["itself", "others", "encoder", "transformer, sequence first"])
def test_single_precision_is_right_to_five_digits(name: str) -> None:
    coverage, worst = per_sample(shaken(NETS[name]()), (torch.randn(5, 18), LABELS))
    assert worst < 1e-5
    assert coverage.left_out == {}


def test_appended_keys_and_values_are_left_to_torch_func() -> None:
    net = shaken(Attends(itself(add_bias_kv=True, batch_first=True)).double())
    coverage, worst = per_sample(net, (torch.randn(5, 18, dtype=torch.float64), LABELS))
    assert worst < 1e-10
    assert coverage.fallback is not None
    assert [block.name for block in coverage.fallback.blocks] == ["layer.bias_k", "layer.bias_v"]
    assert coverage.blocks["layer.in_proj_weight"].groups == 3
    assert coverage.left_out == {}


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "no weights": {"need_weights": False},
    "each head's weights": {"average_attn_weights": False},
    "padding": {"key_padding_mask": torch.tensor([[0, 0, 1], [0, 0, 0], [0, 1, 1], [0, 0, 0]]).bool()},
    "additive": {"attn_mask": torch.randn(3, 3, dtype=torch.float64), "need_weights": False},
    "additive, each head its own": {"attn_mask": torch.randn(8, 3, 3, dtype=torch.float64)},
    "true is masked, with padding": {
        "attn_mask": torch.tensor([[0, 1, 0], [0, 0, 0], [0, 0, 1]]).bool(),
        "key_padding_mask": torch.tensor([[0, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]]).bool(),
    },
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{"batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_the_output_is_the_layers_own(options: dict[str, Any], mask: str) -> None:
    layer = shaken(itself(**options).double())
    steps = torch.randn(4, 3, 6, dtype=torch.float64)
    steps = steps if layer.batch_first else steps.transpose(0, 1)
    with differentiable(layer):
        output, weights = layer(steps, steps, steps, **MASKS[mask])
        call = LayerCall(layer, (steps, steps, steps), MASKS[mask], (output, weights), 0 if layer.batch_first else 1)
        found, uses = RULES[nn.MultiheadAttention](call)
    assert len(uses) == 2
    assert found[0] is not output
    assert torch.allclose(found[0], output, rtol=0, atol=1e-12)
    assert (weights is None) == (found[1] is None)
    assert weights is None or torch.allclose(found[1], weights, rtol=0, atol=1e-12)


def test_options_in_their_places_are_read_as_by_name() -> None:
    layer, steps = itself(batch_first=True).double().eval(), torch.randn(2, 3, 6, dtype=torch.float64)
    padding, mask = torch.tensor([[0, 0, -torch.inf], [0, 0, 0]]).double(), CAUSAL.double()
    args = (steps, steps, steps, padding, True, mask, False, False)
    output = layer(*args)
    found, _ = RULES[nn.MultiheadAttention](LayerCall(layer, args, {}, output, 0))
    assert all(torch.allclose(ours, theirs, rtol=0, atol=1e-12) for ours, theirs in zip(found, output, strict=True))
    assert found[1].shape == (2, 2, 3, 3)


def test_samples_along_the_positions_are_not_taken_for_samples() -> None:
    layer, steps = itself(batch_first=True), torch.randn(3, 3, 6)
    output = layer(steps, steps, steps)
    assert RULES[nn.MultiheadAttention](LayerCall(layer, (steps, steps, steps), {}, output, 1)) == (output, [])
