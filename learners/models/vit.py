"""A small vision transformer for small images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learners.models.networks import image_shape
from learners.modules.drop import StochasticDepth, rate


class Patches(nn.Module):
    """Images [n, c, h, w] → tokens [n, hw/p², dim]: a linear map of every patch of p × p."""

    def __init__(self, channels: int, patch: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(channels * patch * patch, dim)

    def forward(self, x: Tensor) -> Tensor:
        (n, c, h, w), p = x.shape, self.patch
        patches = x.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)  # [n, h/p, w/p, c, p, p]
        y: Tensor = self.linear(patches.reshape(n, (h // p) * (w // p), c * p * p))
        return y


class Attention(nn.Module):
    """softmax(q kᵀ/√d) v per head (Vaswani et al. 2017, §3.2); x [n, tokens, dim]."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [n, heads, tokens, d]
        # Written out: fused kernels have no second derivatives.
        weights = (q @ k.transpose(-2, -1) / math.sqrt(dim // self.heads)).softmax(-1)
        if self.training and self.dropout > 0:
            weights = F.dropout(weights, self.dropout)
        y: Tensor = self.out((weights @ v).transpose(1, 2).reshape(n, tokens, dim))
        return y


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, skipped: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads, dropout)
        self.norm2, self.linear1, self.linear2 = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.activation = nn.GELU()
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.skip = StochasticDepth(skipped)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.skip(self.drop(self.attention(self.norm1(x))))
        inner = self.drop(self.activation(self.linear1(self.norm2(x))))
        y: Tensor = x + self.skip(self.drop(self.linear2(inner)))
        return y


class Tokens(nn.Module):
    """Tokens [n, t, dim] with a learned class token before them, if there is to be one, and learned positions."""

    def __init__(self, tokens: int, dim: int, dropout: float, *, first: bool) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(1, 1, dim)) if first else None
        self.position = nn.Parameter(torch.empty(1, tokens + first, dim))
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        for p in self.parameters():
            nn.init.trunc_normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if self.first is not None:
            x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        y: Tensor = self.drop(x + self.position)
        return y


class Pooled(nn.Module):
    """[n, tokens, dim] → [n, dim]: the first token, or the mean."""

    def __init__(self, pooling: Literal["token", "mean"]) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.pooling == "token" else x.mean(1)


@dataclass(frozen=True)
class ViT:
    """Vision transformer, normalised before each branch (Dosovitskiy et al. 2021); by default ViT-small (DeiT-S)."""

    patch: int = 8
    """Side of a patch; divides the images'."""
    dim: int = 384
    """Width of a token."""
    depth: int = 12
    """Blocks."""
    heads: int = 6
    """Attention heads of a block; divides `dim`."""
    hidden: int = 4
    """Width of a block's hidden layer, times `dim`."""
    pooling: Literal["token", "mean"] = "token"
    """What the head sees: the class token, or the mean of all tokens (there is no class token then)."""
    dropout: float = 0.0
    """Rate of dropout on tokens, attention weights and hidden layers."""
    stochastic_depth: float = 0.0
    """Rate at which the last block's branches are left out; it rises linearly from 0 in the first."""

    def __post_init__(self) -> None:
        for name in ("patch", "dim", "depth", "heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 wanted")
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads}: a divisor of dim={self.dim} wanted")
        rate("dropout", self.dropout)
        rate("stochastic_depth", self.stochastic_depth)

    def build(self, inputs: tuple[int, ...], outputs: int) -> nn.Module:
        channels, height, width = image_shape("a ViT", inputs)
        if height % self.patch or width % self.patch:
            raise ValueError(f"patch={self.patch}: a divisor of the images' sides {height}×{width} wanted")
        tokens = (height // self.patch) * (width // self.patch)
        model = nn.Sequential()
        model.add_module("patches", Patches(channels, self.patch, self.dim))
        model.add_module("tokens", Tokens(tokens, self.dim, self.dropout, first=self.pooling == "token"))
        for i in range(self.depth):
            skipped = self.stochastic_depth * i / max(1, self.depth - 1)
            block = Block(self.dim, self.heads, self.hidden * self.dim, self.dropout, skipped)
            model.add_module(f"block{i}", block)
        model.add_module("norm", nn.LayerNorm(self.dim))
        model.add_module("features", Pooled(self.pooling))
        model.add_module("head", nn.Linear(self.dim, outputs))
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        return model
