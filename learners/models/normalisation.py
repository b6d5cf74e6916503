"""BatchNorm for an inner loop: statistics by rule, and derivatives that are right however often they are taken.

On the [rows, channels] view, where both passes are contiguous, with a backward pass that is itself differentiable:
torch's native one silently returns wrong second-order gradients in two nestings of transforms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


class _Normalise(torch.autograd.Function):
    """y = (x − mean x) / √(var x + ε) · w + b over rows;  x [rows, channels], w and b [channels]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_batch_norm(x, w, b, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, w, _, ctx.eps = inputs
        _, mean, invstd = output
        ctx.mark_non_differentiable(mean, invstd)
        ctx.save_for_backward(x, w, mean, invstd)

    @staticmethod
    def backward(ctx: Any, gy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, w, mean, invstd = ctx.saved_tensors
        if not torch.is_grad_enabled():
            native = torch.ops.aten.native_batch_norm_backward
            return (*native(gy, x, w, None, None, mean, invstd, True, ctx.eps, [True, True, True]), None)
        # To be differentiated again: the same formula in differentiable pieces, statistics recomputed from x.
        centred, var = _centred(x)
        scale = (var + ctx.eps).rsqrt()
        hat = centred * scale
        gb, gw = gy.sum(0), (gy * hat).sum(0)
        gx = (w * scale) * (gy - (gb + hat * gw) / x.shape[0])
        return gx, gw, gb, None


class _Moments(torch.autograd.Function):
    """Mean and biased variance over rows of x [rows, channels], in few passes over memory (torch's `var_mean` is twenty
    times slower).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean(0)
        centred = x - mean
        return mean, centred.mul_(centred).mean(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, g_mean: Tensor, g_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        slope = 2 * g_var / x.shape[0]
        return torch.addcmul(g_mean / x.shape[0] - mean * slope, x, slope)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return _Moments.apply(x)  # type: ignore[no-untyped-call, no-any-return]


def _affine(x: Tensor, mean: Tensor, var: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    """(x − mean)/√(var + ε) · w + b per channel, in one pass over x."""
    scale = w * (var + eps).rsqrt()
    return torch.addcmul(b - mean * scale, x, scale)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(-2, keepdim=True)
    return centred, (centred * centred).mean(-2)


@dataclass(frozen=True)
class Statistics:
    """Which rows a normalisation takes its statistics from.

    batch: all rows of each of `groups` equal, consecutive groups;  first: the first `reference` examples, for all;
    frozen: the running statistics given among the parameters.
    """

    source: Literal["batch", "first", "frozen"] = "batch"
    groups: int = 1
    reference: int = 0


BATCH = Statistics()


@dataclass
class Normalising:
    """What BatchNorm layers do during one call of a model: an argument that every layer inside receives (see
    `normalising`).
    """

    statistics: Statistics = BATCH
    seen: dict[nn.Module, tuple[Tensor, Tensor]] | None = None
    """Where asked for: mean and biased variance of what reached each layer."""


_NORMALISING: ContextVar[Normalising | None] = ContextVar("_NORMALISING", default=None)


@contextmanager
def normalising(how: Normalising) -> Iterator[None]:
    """Inside, BatchNorm layers follow `how`; outside of any, they take the batch's statistics.

    A module's `forward` takes inputs only, so that this argument reaches the layers beside it. It belongs to the call:
    nothing of it is left in a module afterwards, and calls in other threads have their own.
    """
    token = _NORMALISING.set(how)
    try:
        yield
    finally:
        _NORMALISING.reset(token)


class BatchNorm(nn.Module):
    """Batch normalisation over axis 1 of [n, C], [n, C, L], [n, C, H, W] or [n, C, D, H, W] inputs.

    y = (x − μ)/√(σ² + ε) · weight + bias with the biased variance; μ and σ² from the rows that the call's `Statistics`
    name (`normalising`). `running_mean` and `running_var` are read only when frozen and never written: whoever wants a
    batch's own statistics asks the call for what it has seen.
    """

    def __init__(self, channels: int, eps: float = 1e-5, *, scale: bool = True, shift: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if scale else None
        self.bias = nn.Parameter(torch.zeros(channels)) if shift else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    @classmethod
    def replacing(cls, native: nn.modules.batchnorm._BatchNorm) -> BatchNorm:
        """Ours with the parameters and running statistics of torch's."""
        ours = cls(native.num_features, native.eps, scale=native.affine, shift=native.affine)
        state = {k: v for k, v in native.state_dict().items() if k != "num_batches_tracked"}
        for like in state.values():
            ours = ours.to(like)
        ours.load_state_dict(state, strict=False)
        return ours

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1)
        channels = rows.shape[-1]
        y = self._rows(rows.reshape(-1, channels), x.shape[0])
        return y.view(rows.shape).movedim(-1, 1)

    def _rows(self, v: Tensor, examples: int) -> Tensor:
        w = self.weight if self.weight is not None else v.new_ones(v.shape[-1])
        b = self.bias if self.bias is not None else v.new_zeros(v.shape[-1])
        call = _NORMALISING.get() or Normalising()
        if call.seen is not None:
            call.seen[self] = _moments(v)
        how = call.statistics
        if how.source == "frozen":
            return _affine(v, self.get_buffer("running_mean"), self.get_buffer("running_var"), w, b, self.eps)
        if how.source == "first":
            return _affine(v, *_moments(v[: v.shape[0] // examples * how.reference]), w, b, self.eps)
        if how.groups == 1:
            y: Tensor = _Normalise.apply(v, w, b, self.eps)[0]  # type: ignore[no-untyped-call]
            return y
        centred, var = _centred(v.view(how.groups, -1, v.shape[-1]))
        return (centred * (w * (var + self.eps).rsqrt()).unsqueeze(1) + b).view(v.shape)
