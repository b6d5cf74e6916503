"""Wide residual networks for small images: WRN-28-10 and its kin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learners.models.networks import SpatialMean, image_shape
from learners.modules.drop import rate
from learners.modules.normalisation import BatchNorm


class Block(nn.Module):
    """a = relu(norm(x)), y = conv(drop(relu(norm(conv(a))))) + x, or + conv1×1(a) where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = BatchNorm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = BatchNorm(outputs)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        changes = stride > 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.norm1(x))
        inner = self.conv2(self.drop(self.relu(self.norm2(self.conv1(a)))))
        y: Tensor = inner + (x if self.shortcut is None else self.shortcut(a))
        return y


@dataclass(frozen=True)
class WideResNet:
    """WRN-28-10 (Zagoruyko, Komodakis 2016): three stages of (depth − 4)/6 blocks, 16, 32, 64 times k channels."""

    depth: int = 28
    """Layers, 6n + 4."""
    widen: int = 10
    """k."""
    dropout: float = 0.0
    """Rate of dropout between the two convolutions of a block; theirs is 0.3 where there is any."""

    def __post_init__(self) -> None:
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"depth={self.depth}: one of 10, 16, 22, 28, … wanted")
        if self.widen < 1:
            raise ValueError(f"widen={self.widen}: at least 1 wanted")
        rate("dropout", self.dropout)

    def build(self, inputs: tuple[int, ...], outputs: int) -> nn.Module:
        colours, _, _ = image_shape("a wide ResNet", inputs)
        model = nn.Sequential()
        model.add_module("stem", nn.Conv2d(colours, 16, 3, padding=1, bias=False))
        channels = 16
        for stage in range(3):
            for block in range((self.depth - 4) // 6):
                wanted, stride = 16 * self.widen << stage, 2 if stage and not block else 1
                model.add_module(f"stage{stage}_{block}", Block(channels, wanted, stride, self.dropout))
                channels = wanted
        model.add_module("norm", BatchNorm(channels))
        model.add_module("relu", nn.ReLU())
        model.add_module("features", SpatialMean())
        for p in model.parameters():
            if p.ndim == 4:
                nn.init.kaiming_normal_(p)
        model.add_module("head", nn.Linear(channels, outputs))
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
