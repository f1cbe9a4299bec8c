"""Small networks that attributions are tested on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pooled(nn.Module):
    """Convolutions, batch normalisation, max pooling, dropout, and a linear layer of the last map's mean."""

    def __init__(self, channels: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.last = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.norm(self.conv1(x))))
        return self.head(self.drop(self.last(self.conv2(x)).mean((2, 3))))


class Rectified(nn.Module):
    """Two convolutions with a max pooling between; the activation is given."""

    def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.relu = relu
        self.conv1, self.conv2 = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu(self.conv1(x)), 2)
        return self.head(self.relu(self.conv2(x)).mean((2, 3)))


class Text(nn.Module):
    """Embedded tokens, a transformer's layer, and the mean over the tokens that count."""

    def __init__(self, cls: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.cls = nn.Linear(8, 3), cls

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self.encoder(self.embed(input_ids), src_key_padding_mask=mask == 0)
        if self.cls:
            return self.head(states[:, 0])
        return self.head((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class ViT(nn.Module):
    """Patches of 4 × 4, two blocks, and an answer from the class token or from the mean over patches."""

    def __init__(self, cls: bool) -> None:
        super().__init__()
        self.patches, self.cls = nn.Conv2d(3, 8, 4, 4), cls
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.cls:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.cls else x.mean(1))


class Block(nn.Module):
    """Attention and a perceptron, normalised before each, as vision transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(F.scaled_dot_product_attention(*self.qkv(self.norm1(x)).chunk(3, -1)))
        return x + self.mlp(self.norm2(x))
