"""Random numbers inside a model, as a function of the work: dropout whose masks are the same on any fleet.

A model that draws from torch's generator gives other numbers on another worker, in another order of tasks, under vmap.
Here every draw is a hash of (the task's key, the inner step, the number of the call, the element): tensor operations on
integers, that run in a loop, under vmap and in a compiled graph alike (the idea of counter-based generators: Salmon,
Moraes, Dror, Shaw 2011).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from learners.modules.attention import attention_with

WORD = (1 << 32) - 1
QUERY = -1
"""The step that the query's draws belong to."""


def mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit words, held in int64, each of whose outputs' bits depends on all of the input's.

    Two rounds of xor-shift and multiplication; multipliers below 2³¹ (found by C. Wellons' hash prospector), so that
    no product overflows.
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & WORD
    x = (x ^ (x >> 15)) * 0x735A2D97 & WORD
    return x ^ (x >> 15)


@dataclass
class Draws:
    """The draws of one evaluation of a loss: those of inner step number `step` of the task with this `key`.

    `key` is an int64 scalar, drawn with the task; calls of a forward pass are counted in the order they come.
    """

    key: Tensor
    step: int
    calls: int = 0

    def words(self, shape: torch.Size) -> Tensor:
        """Uniform 32-bit words, int64 of this shape."""
        place = (self.step + 1) * 0x9E3779B1 + self.calls * 0x85EBCA77 & WORD
        self.calls += 1
        low, high = mixed(self.key & WORD ^ place), mixed(self.key >> 32 & WORD)
        stream = mixed(low + high & WORD)
        index = torch.arange(shape.numel(), device=self.key.device).view(shape)
        return mixed(mixed(index & WORD ^ stream) + low & WORD)

    def uniform(self, like: Tensor, shape: torch.Size | None = None) -> Tensor:
        """U[0, 1) of `like`'s shape and dtype, in steps of 2⁻²⁴."""
        return (self.words(like.shape if shape is None else shape) >> 8).to(like.dtype) * 2.0**-24

    def normal(self, like: Tensor) -> Tensor:
        """N(0, 1) by Box and Muller's √(−2 ln u) cos 2πv."""
        u, v = 1 - self.uniform(like), self.uniform(like)
        return (-2 * u.log()).sqrt() * (2 * math.pi * v).cos()

    def kept(self, p: float, like: Tensor, shape: torch.Size | None = None) -> Tensor:
        """1 with probability 1 − p, else 0."""
        return (self.words(like.shape if shape is None else shape) < round((1 - p) * 2**32)).to(like.dtype)


def dropout(draws: Draws, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """x ∘ m / (1 − p), m ~ Bernoulli(1 − p) per entry (Srivastava et al. 2014)."""
    return _dropped(draws, x, p, training, x.shape)


def _of_channels(draws: Draws, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return _dropped(draws, x, p, training, torch.Size([*x.shape[:2], *(1 for _ in x.shape[2:])]))


def _dropped(draws: Draws, x: Tensor, p: float, training: bool, shape: torch.Size) -> Tensor:
    if not training or p == 0:
        return x
    return x * draws.kept(p, x, shape) * (1 / (1 - p)) if p < 1 else x * 0


def _alpha(draws: Draws, x: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    return _alpha_dropped(draws, x, p, training, x.shape)


def _alpha_of_channels(
    draws: Draws, x: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    return _alpha_dropped(draws, x, p, training, torch.Size([*x.shape[:2], *(1 for _ in x.shape[2:])]))


def _alpha_dropped(draws: Draws, x: Tensor, p: float, training: bool, shape: torch.Size) -> Tensor:
    """Keeps mean 0 and variance 1 of what goes through SELU (Klambauer et al. 2017): −αλ where dropped."""
    if not training or p == 0:
        return x
    if p == 1:
        return x * 0
    low = -1.7580993408473766
    kept = draws.kept(p, x, shape)
    a = ((1 - p) * (1 + p * low**2)) ** -0.5
    return torch.sub(a * (x * kept + low * (1 - kept)), a * p * low)


def _rrelu(
    draws: Draws, x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    if not training:
        return F.rrelu(x, lower, upper, training=False)
    return torch.where(x >= 0, x, x * (lower + (upper - lower) * draws.uniform(x)))


def _scaled_dot_product_attention(
    draws: Draws, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if dropout_p == 0:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        off = (
            torch.zeros_like(scores).masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else attn_mask
        )
        scores = scores + off
    return dropout(draws, scores.softmax(-1), dropout_p) @ value


_ATTENTION = signature(F.multi_head_attention_forward)


def _multi_head_attention(draws: Draws, *args: Any, **kwargs: Any) -> Any:
    given = _ATTENTION.bind(*args, **kwargs).arguments
    if not given.get("training", True) or given["dropout_p"] == 0:
        return F.multi_head_attention_forward(*args, **kwargs)
    return attention_with(lambda w, p: dropout(draws, w, p), *args, **kwargs)


def _bernoulli_(draws: Draws, x: Tensor, p: float = 0.5, **_: Any) -> Tensor:
    return draws.kept(1 - p, x)


def _uniform_(draws: Draws, x: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
    return low + (high - low) * draws.uniform(x)


def _normal_(draws: Draws, x: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return mean + std * draws.normal(x)


def _bernoulli(draws: Draws, x: Tensor, **_: Any) -> Tensor:
    return (draws.uniform(x) < x).to(x.dtype)


def _like(draw: Callable[[Draws, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda draws, x, **options: draw(draws, torch.empty_like(x, **options))


def _shaped(draw: Callable[[Draws, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda draws, *size, **options: draw(draws, torch.empty(*size, **options).to(draws.key.device))


Replacement: TypeAlias = Callable[..., Any]
REPLACED: dict[Any, Replacement] = {
    F.dropout: dropout, torch.dropout: dropout,
    F.dropout1d: _of_channels, F.dropout2d: _of_channels, F.dropout3d: _of_channels,
    torch.feature_dropout: _of_channels,
    F.alpha_dropout: _alpha, torch.alpha_dropout: _alpha, F.feature_alpha_dropout: _alpha_of_channels,
    F.rrelu: _rrelu, F.scaled_dot_product_attention: _scaled_dot_product_attention,
    F.multi_head_attention_forward: _multi_head_attention,
    torch.bernoulli: _bernoulli, Tensor.bernoulli: _bernoulli, Tensor.bernoulli_: _bernoulli_,
    Tensor.uniform_: _uniform_, Tensor.normal_: _normal_,
    torch.rand_like: _like(Draws.uniform), torch.randn_like: _like(Draws.normal),
    torch.rand: _shaped(Draws.uniform), torch.randn: _shaped(Draws.normal),
}  # fmt: skip
"""What draws from torch's generator, and what stands in its place. Those in place return their result: as in torch,
but what they were called on keeps its values."""


class Drawing(TorchFunctionMode):
    """Inside, torch's draws come from `draws`."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.draws = draws

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        instead = REPLACED.get(func)
        if instead is None:
            return func(*args, **(kwargs or {}))
        return instead(self.draws, *args, **(kwargs or {}))


DROPOUTS = (
    F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.feature_dropout, F.alpha_dropout,
    torch.alpha_dropout, F.feature_alpha_dropout,
)  # fmt: skip


class Still(TorchFunctionMode):
    """Inside, dropout leaves its input as it is, asked for `training` or not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DROPOUTS:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))
