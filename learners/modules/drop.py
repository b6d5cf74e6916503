"""DropBlock and stochastic depth: dropout of squares, and of whole branches.

Their draws are torch's own calls, in whose place `functional` puts the task's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rate(name: str, value: float) -> float:
    """`value`, where it is the rate of a dropout. Raises ValueError where it is not."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value}: a number from 0 to less than 1 wanted")
    return value


class DropBlock(nn.Module):
    """x ∘ m · count(m) / Σ m, m [n, c, h, w] being 0 on random squares of b × b, else 1 (Ghiasi, Lin, Le 2018,
    Algorithm 1).

    Squares lie within the map: each of its (h − b + 1)(w − b + 1) places is taken with probability
    γ = p/b² · hw/((h − b + 1)(w − b + 1)), independently per example and channel.
    """

    def __init__(self, p: float, block: int) -> None:
        super().__init__()
        self.p, self.block = rate("p", p), block

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = self.mask(x)
        # One factor for all examples, as published; at least 1 where nothing is left.
        return x * kept * (kept.numel() / kept.sum().clamp(min=1))

    def mask(self, x: Tensor) -> Tensor:
        """m: 0 on the squares, else 1."""
        height, width = x.shape[2:]
        rows, columns = height - self.block + 1, width - self.block + 1
        gamma = self.p / self.block**2 * height * width / (rows * columns)
        taken = (torch.rand_like(x[:, :, :rows, :columns].detach()) < gamma).to(x.dtype)
        # Whether a square covers a position: whether one of the b × b places that reach it is taken.
        return 1 - F.max_pool2d(F.pad(taken, [self.block - 1] * 4), self.block, stride=1)


class StochasticDepth(nn.Module):
    """A residual branch, left out of an example with probability p, else divided by 1 − p (Huang et al. 2016)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = rate("p", p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        one = x[(slice(None), *(slice(1) for _ in x.shape[1:]))]  # [n, 1, …]
        return x * (torch.rand_like(one.detach()) >= self.p).to(x.dtype) / (1 - self.p)
