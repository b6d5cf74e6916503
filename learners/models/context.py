"""Networks with context parameters (CAVIA, Zintgraf et al. 2019): a few numbers that say which task it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from learners.models.networks import MLP, Conv4, ModelSpec


class Concatenated(nn.Module):
    """[n, d] → [n, d + c]: the context, a parameter of c numbers, beside every input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.context.expand(len(x), -1)], 1)


class Film(nn.Module):
    """(1 + γ) x + β, channel by channel of [n, C, h, w]; (γ, β) is a linear function of the context."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(size))
        self.linear = nn.Linear(size, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        gamma, beta = self.linear(self.context)[:, None, None].chunk(2)
        y: Tensor = (1 + gamma) * x + beta
        return y


@dataclass(frozen=True)
class ContextMLP:
    """Fully connected network with the context beside its inputs; the paper's for sinusoids by default."""

    hidden: tuple[int, ...] = (40, 40)
    """Widths of the hidden layers."""
    activation: Literal["relu", "tanh"] = "relu"
    """Nonlinearity behind each hidden layer."""
    size: int = 5
    """Context parameters."""

    def __post_init__(self) -> None:
        _check(self.size)

    def build(self, inputs: tuple[int, ...], outputs: int) -> nn.Module:
        plain = MLP(self.hidden, activation=self.activation).build((torch.Size(inputs).numel() + self.size,), outputs)
        model = nn.Sequential()
        for name, layer in plain.named_children():
            model.add_module(name, layer)
            if name == "flatten":
                model.add_module("concatenated", Concatenated(self.size))
        return model


@dataclass(frozen=True)
class ContextConv4:
    """Conv4 whose third block the context scales and shifts, channel by channel, before its ReLU.

    The paper's for images but for the 1 in 1 + γ, which is ours: at its start the block is nearly Conv4's.
    """

    network: ModelSpec = field(default_factory=Conv4)
    """A Conv4, with its keys."""
    size: int = 100
    """Context parameters."""

    def __post_init__(self) -> None:
        _check(self.size)
        if not isinstance(self.network, Conv4):
            raise ValueError(f"network={type(self.network).__name__}: Conv4 wanted")

    def build(self, inputs: tuple[int, ...], outputs: int) -> nn.Module:
        assert isinstance(self.network, Conv4)
        model = self.network.build(inputs, outputs)
        block = model.get_submodule("block2")
        relu = block.get_submodule("relu")
        del block.relu
        block.add_module("film", Film(self.size, self.network.width))
        block.add_module("relu", relu)
        return model


def _check(size: int) -> None:
    if size < 1:
        raise ValueError(f"size={size}: at least 1 context parameter wanted")
