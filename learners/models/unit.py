"""Features of length 1 before the head: what cosine classifiers and normalised centroids want."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from learners.models.networks import Conv4, ModelSpec


def unit(z: Tensor) -> Tensor:
    """z/‖z‖ for each row of [n, d]; 0 stays 0, with finite derivatives of any order."""
    square = z.square().sum(1, keepdim=True)
    return z * torch.where(square > 0, square, 1.0).rsqrt()


class UnitFeatures(nn.Module):
    """[n, d] → [n, d], each row at length 1."""

    def forward(self, z: Tensor) -> Tensor:
        return unit(z)


@dataclass(frozen=True)
class Unit:
    """Another model with its features scaled to length 1 before the head; names and shapes of parameters stay."""

    network: ModelSpec = field(default_factory=Conv4)
    """The other model: layers in a row, the last of them `head`."""

    def build(self, inputs: tuple[int, ...], outputs: int) -> nn.Module:
        built = self.network.build(inputs, outputs)
        layers = dict(built.named_children())
        if not isinstance(built, nn.Sequential) or list(layers)[-1] != "head":
            raise ValueError(f"{type(self.network).__name__} does not end in a layer named head")
        model = nn.Sequential()
        for name, layer in layers.items():
            if name == "head":
                model.add_module("unit", UnitFeatures())
            model.add_module(name, layer)
        return model
