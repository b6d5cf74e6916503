"""ResNet-10 and -18 as they are used for small images: a 3×3 stem without pooling, four stages, a linear head on the
spatial mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from learners.models.networks import SpatialMean, image_shape
from learners.modules.normalisation import BatchNorm


class Block(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)) (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = BatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = BatchNorm(outputs)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut.add_module("conv", nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.add_module("norm", BatchNorm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y: Tensor = self.relu(inner + self.shortcut(x))
        return y


@dataclass(frozen=True)
class ResNet:
    """Four stages of one (10) or two (18) blocks, width × 1, 2, 4, 8 channels, halving before stages two to four."""

    depth: Literal[10, 18] = 10
    """Layers."""
    width: int = 64
    """Channels of the stem and the first stage."""

    def build(self, inputs: tuple[int, ...], outputs: int) -> nn.Module:
        colours, _, _ = image_shape("a ResNet", inputs)
        model = nn.Sequential()
        model.add_module("stem", nn.Conv2d(colours, self.width, 3, padding=1, bias=False))
        model.add_module("norm", BatchNorm(self.width))
        channels = self.width
        for stage in range(4):
            for block in range(1 if self.depth == 10 else 2):
                wanted, stride = self.width << stage, 2 if stage and not block else 1
                model.add_module(f"stage{stage}_{block}", Block(channels, wanted, stride))
                channels = wanted
        model.add_module("features", SpatialMean())
        model.add_module("head", nn.Linear(channels, outputs))
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
