"""MLP, policies and Conv4 as ordinary modules."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from learners.modules import normalisation

log = logging.getLogger("metafleet")


class ModelSpec(Protocol):
    """A frozen dataclass that builds a module for given input and output shapes."""

    def build(self, inputs: tuple[int, ...], outputs: int) -> nn.Module:
        """A freshly initialised module; draws from torch's global generator, which the caller seeds."""


Init = Literal["torch", "cbfinn"]


@dataclass(frozen=True)
class MLP:
    """Fully connected network; the sinusoid network of the MAML paper by default (1-40-40-1, ReLU)."""

    hidden: tuple[int, ...] = (40, 40)
    """Widths of the hidden layers."""
    init: Init = "torch"
    """"torch": the framework's; "cbfinn": weights N(0, 0.01) cut at two sigma, biases 0, as in the MAML code."""
    activation: Literal["relu", "tanh"] = "relu"
    """Nonlinearity behind each hidden layer."""
    norm: bool = False
    """BatchNorm (shift only) after each hidden layer, as in the MAML paper's non-convolutional Omniglot network."""

    def build(self, inputs: tuple[int, ...], outputs: int) -> nn.Module:
        model = nn.Sequential()
        model.add_module("flatten", nn.Flatten())
        width = torch.Size(inputs).numel()
        for i, hidden in enumerate(self.hidden):
            model.add_module(f"linear{i}", nn.Linear(width, hidden, bias=not self.norm))
            if self.norm:
                model.add_module(f"norm{i}", normalisation.BatchNorm(hidden, scale=False))
            model.add_module(f"{self.activation}{i}", nn.ReLU() if self.activation == "relu" else nn.Tanh())
            width = hidden
        model.add_module("head", nn.Linear(width, outputs))
        if self.init == "cbfinn":
            for p in model.parameters():
                if p.ndim == 2:
                    nn.init.trunc_normal_(p, std=0.01, a=-0.02, b=0.02)
                elif p.ndim == 1:
                    nn.init.zeros_(p)
        return model


class Gaussian(nn.Module):
    """A normal policy: [n, o] → [n, 2a], means of a network and log standard deviations that do not depend on the
    state.
    """

    def __init__(self, net: nn.Module, actions: int, std: float, min_std: float) -> None:
        super().__init__()
        self.net = net
        self.log_std = nn.Parameter(torch.full((actions,), math.log(std)))
        self.least = math.log(min_std)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.net(x)
        return torch.cat([mean, self.log_std.clamp(min=self.least).expand(mean.shape)], -1)


@dataclass(frozen=True)
class GaussianMLP:
    """Normal policy on a fully connected network; that of the MAML paper by default (100-100, ReLU, Xavier, std 1)."""

    hidden: tuple[int, ...] = (100, 100)
    """Widths of the hidden layers."""
    activation: Literal["relu", "tanh"] = "relu"
    """Nonlinearity behind each hidden layer."""
    std: float = 1.0
    """First standard deviation of every action."""
    min_std: float = 1e-6
    """Least standard deviation."""

    def __post_init__(self) -> None:
        if not 0 < self.min_std <= self.std:
            raise ValueError(f"std={self.std}, min_std={self.min_std}: 0 < min_std ≤ std wanted")

    def build(self, inputs: tuple[int, ...], outputs: int) -> nn.Module:
        net = MLP(self.hidden, activation=self.activation).build(inputs, outputs)
        for p in net.parameters():
            nn.init.xavier_uniform_(p) if p.ndim == 2 else nn.init.zeros_(p)
        return Gaussian(net, outputs, self.std, self.min_std)


def image_shape(network: str, inputs: tuple[int, ...]) -> tuple[int, int, int]:
    """(channels, height, width) of a network's inputs. Raises ValueError where they are no images."""
    if len(inputs) != 3:
        raise ValueError(f"{network} wants images (channels, height, width), the task gives inputs of shape {inputs}")
    return inputs


class SpatialMean(nn.Module):
    """[n, C, H, W] → [n, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@dataclass(frozen=True)
class Conv4:
    """Four blocks of 3×3 convolution, BatchNorm, ReLU and halving, then a linear head: few-shot's standard network.

    Convolutions have no bias: the normalisation behind it would cancel it. ReLU stands behind the pooling, which
    gives the same numbers on a quarter of the pixels.
    """

    width: int = 64
    """Channels of every block (Omniglot 64, MiniImagenet 32)."""
    halving: Literal["stride", "pool", "pool_same"] = "stride"
    """Stride 2, 2×2 max-pooling that drops a last odd row (valid), or one that keeps it (same)."""
    features: Literal["mean", "flat"] = "mean"
    """What the head sees: the mean over space (MAML's Omniglot network) or all positions."""
    norm_scale: bool = False
    """Learn a scale γ in BatchNorm beside the shift β; the MAML code has none."""
    init: Init = "torch"
    """"torch": the framework's; "cbfinn": Xavier convolutions and an N(0, 1) head, as in the MAML code."""

    def build(self, inputs: tuple[int, ...], outputs: int) -> nn.Module:
        channels, *size = image_shape("Conv4", inputs)
        blocks = []
        for _ in range(4):
            blocks.append(self._block(channels))
            channels = self.width
            size = [s // 2 if self.halving == "pool" else -(-s // 2) for s in size]
        if min(size) < 1:
            raise ValueError(
                f"Conv4 halves four times; images of {inputs[1]}×{inputs[2]} are too small (16 or more wanted)"
            )
        flat = self.features == "flat"
        head = nn.Linear(channels * (size[0] * size[1] if flat else 1), outputs)
        model = nn.Sequential()
        for i, block in enumerate(blocks):
            model.add_module(f"block{i}", block)
        model.add_module("features", nn.Flatten() if flat else SpatialMean())
        model.add_module("head", head)
        if self.init == "cbfinn":
            for p in model.parameters():
                if p.ndim == 4:
                    nn.init.xavier_uniform_(p)
            nn.init.normal_(head.weight)
            nn.init.zeros_(head.bias)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def _block(self, channels: int) -> nn.Module:
        stride = 2 if self.halving == "stride" else 1
        block = nn.Sequential()
        block.add_module("conv", nn.Conv2d(channels, self.width, 3, stride, padding=1, bias=False))
        block.add_module("norm", normalisation.BatchNorm(self.width, scale=self.norm_scale))
        if self.halving != "stride":
            block.add_module("pool", nn.MaxPool2d(2, ceil_mode=self.halving == "pool_same"))
        block.add_module("relu", nn.ReLU())
        return block
