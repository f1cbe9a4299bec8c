"""How each kind of layer yields the factors of its weights' gradients: one rule for each kind."""

from __future__ import annotations

from torch import nn

from lightning_interp.influence.gradients.rules.attention import attention
from lightning_interp.influence.gradients.rules.call import LayerCall, ParameterUse, Rule
from lightning_interp.influence.gradients.rules.convolution import convolution
from lightning_interp.influence.gradients.rules.embedding import embedding
from lightning_interp.influence.gradients.rules.linear import linear
from lightning_interp.influence.gradients.rules.normalization import batch_norm, group_norm, layer_norm, rms_norm
from lightning_interp.influence.gradients.rules.recurrent import cell, recurrent

RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.GroupNorm: group_norm,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
    nn.RNN: recurrent,
    nn.LSTM: recurrent,
    nn.GRU: recurrent,
    nn.RNNCell: cell,
    nn.LSTMCell: cell,
    nn.GRUCell: cell,
    nn.MultiheadAttention: attention,
}

__all__ = ["RULES", "LayerCall", "ParameterUse", "Rule"]
