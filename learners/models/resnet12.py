"""ResNet-12, few-shot learning's standard since 2018, with DropBlock as in MetaOptNet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learners.models.networks import SpatialMean, image_shape
from learners.modules.drop import DropBlock, rate
from learners.modules.normalisation import BatchNorm


class Block(nn.Module):
    """drop(relu(pool(f₃(relu(f₂(relu(f₁(x))))) + s(x)))), f convolution and normalisation, s the same of kernel 1.

    The last nonlinearity stands behind the pooling, which gives the same numbers on a quarter of the pixels.
    """

    def __init__(self, inputs: int, outputs: int, drop: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = BatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = BatchNorm(outputs)
        self.conv3 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm3 = BatchNorm(outputs)
        self.shortcut = nn.Sequential()
        self.shortcut.add_module("conv", nn.Conv2d(inputs, outputs, 1, bias=False))
        self.shortcut.add_module("norm", BatchNorm(outputs))
        self.relu = nn.LeakyReLU(0.1)
        self.pool = nn.MaxPool2d(2)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu(self.norm1(self.conv1(x)))
        inner = self.relu(self.norm2(self.conv2(inner)))
        inner = self.norm3(self.conv3(inner))
        y: Tensor = self.drop(self.relu(self.pool(inner + self.shortcut(x))))
        return y


@dataclass(frozen=True)
class ResNet12:
    """Four residual blocks of three 3×3 convolutions, LeakyReLU(0.1), each halving; a linear head on the spatial mean.

    As in Lee, Maji, Ravichandran, Soatto 2019 (MetaOptNet), whose rates rise to theirs over the run: here they are
    constant, since a model is a function of its arguments.
    """

    widths: tuple[int, int, int, int] = (64, 160, 320, 640)
    """Channels of the blocks (12.4 million parameters; 64 128 256 512: 8.0 million)."""
    dropout: float = 0.1
    """Rate of dropout behind the first two blocks."""
    drop_block: float = 0.1
    """Rate of DropBlock behind the last two."""
    block: int = 5
    """Side of its squares: 5 for images of 84×84, 2 for those of 32×32."""

    def __post_init__(self) -> None:
        if min(self.widths) < 1:
            raise ValueError(f"widths={self.widths}: at least 1 channel each wanted")
        rate("dropout", self.dropout)
        rate("drop_block", self.drop_block)
        if self.block < 1:
            raise ValueError(f"block={self.block}: at least 1 wanted")

    def build(self, inputs: tuple[int, ...], outputs: int) -> nn.Module:
        channels, height, width = image_shape("ResNet-12", inputs)
        last = min(height, width) // 16
        if last < 1:
            raise ValueError(
                f"ResNet-12 halves four times; images of {inputs[1]}×{inputs[2]} are too small (16 or more wanted)"
            )
        if self.drop_block and self.block > last:
            raise ValueError(
                f"block={self.block}: the last maps of images of {inputs[1]}×{inputs[2]} are {inputs[1] // 16}×"
                f"{inputs[2] // 16}; {last} or less, or drop_block=0, wanted"
            )
        model = nn.Sequential()
        for i, width in enumerate(self.widths):
            drop = nn.Dropout(self.dropout) if i < 2 else DropBlock(self.drop_block, self.block)
            model.add_module(f"block{i}", Block(channels, width, drop if drop.p else nn.Identity()))
            channels = width
        model.add_module("features", SpatialMean())
        for p in model.parameters():
            if p.ndim == 4:
                nn.init.kaiming_normal_(p, mode="fan_out", nonlinearity="leaky_relu")
        model.add_module("head", nn.Linear(channels, outputs))
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
