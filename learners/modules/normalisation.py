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

from learners.engine.derivative import transformed


class _Normalise(torch.autograd.Function):
    """y = (x − mean x) / √(var x + ε) · w + b per channel;  x [rows, channels] or [n, channels, L]; w, b [channels]."""

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
        hat = centred * _along(scale, x)
        over = _axes(x)
        gb, gw = gy.sum(over), (gy * hat).sum(over)
        gx = _along(w * scale, x) * (gy - (_along(gb, x) + hat * _along(gw, x)) / (x.numel() // x.shape[1]))
        return gx, gw, gb, None


class _Moments(torch.autograd.Function):
    """Mean and biased variance per channel of x [rows, channels] or [n, channels, L], in few passes over memory
    (torch's `var_mean` over rows is twenty times slower).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean(_axes(x))
        centred = x - _along(mean, x)
        return mean, centred.mul_(centred).mean(_axes(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, g_mean: Tensor, g_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        rows = x.numel() // x.shape[1]
        slope = 2 * g_var / rows
        return torch.addcmul(_along(g_mean / rows - mean * slope, x), x, _along(slope, x))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return _Moments.apply(x)  # type: ignore[no-untyped-call, no-any-return]


def _affine(x: Tensor, mean: Tensor, var: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    """(x − mean)/√(var + ε) · w + b per channel, in one pass over x."""
    scale = w * (var + eps).rsqrt()
    return torch.addcmul(_along(b - mean * scale, x), x, _along(scale, x))


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    centred = x - _along(x.mean(_axes(x)), x)
    return centred, (centred * centred).mean(_axes(x))


def _weighted(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of the examples whose weight [groups, n] is 1, among others whose weight is 0;  x [groups, n, channels,
    L], the moments [groups, channels].
    """
    weight = weight.to(x.dtype)[:, :, None, None]
    total = weight.sum(1)[:, :, 0] * x.shape[3]
    mean = (x * weight).sum((1, 3)) / total
    return mean, ((x - mean[:, None, :, None]).square() * weight).sum((1, 3)) / total


def _known_moments(v: Tensor, examples: int, real: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = _weighted(_by_example(v, examples)[None], real[None])
    return mean[0], var[0]


def _by_example(v: Tensor, examples: int) -> Tensor:
    """[n, channels, L] from the same, or from rows [n · L, channels]."""
    return v.view(examples, -1, v.shape[1]).transpose(1, 2) if v.ndim == 2 else v


def _axes(x: Tensor) -> list[int]:
    return [0] if x.ndim == 2 else [0, 2]


def _along(channels: Tensor, x: Tensor) -> Tensor:
    """[channels] as it broadcasts over x."""
    return channels if x.ndim == 2 else channels[:, None]


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
    real: Tensor | None = None
    """Of a padded batch: 1 for examples that are there, 0 for padding [n]; statistics leave the latter out."""


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
    batch's own statistics asks the call for what it has seen. Raises ValueError where a batch has one value per
    channel, whose normalised value would be the bias whatever it is.
    """

    def __init__(self, channels: int, eps: float = 1e-5, *, scale: bool = True, shift: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if scale else None
        self.bias = nn.Parameter(torch.zeros(channels)) if shift else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.channels_last = True
        """Whether images come, and leave, in channels-last memory; else in the memory format they come in."""
        self.constant = False
        """Whether the running statistics are constants, that every call normalises by."""

    @classmethod
    def replacing(cls, native: nn.modules.batchnorm._BatchNorm) -> BatchNorm:
        """Ours with the parameters and running statistics of torch's; constants where it is in evaluation mode."""
        ours = cls(native.num_features, native.eps, scale=native.affine, shift=native.affine)
        for key in ("weight", "bias"):
            if native.affine:  # the very parameters: they may be tied to others, or frozen
                setattr(ours, key, getattr(native, key))
        for key in ("running_mean", "running_var"):
            if native.track_running_stats:
                ours.register_buffer(key, getattr(native, key))
            elif native.affine:
                ours.register_buffer(key, ours.get_buffer(key).to(native.weight))
        ours.constant = native.track_running_stats and not native.training
        return ours

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16:  # of which sums over a batch would lose their digits
            return self.forward(x.float()).to(x.dtype)
        if x.ndim == 2:
            return self._normalised(x, x.shape[0])
        last = not x.is_contiguous() and not transformed() and x.movedim(1, -1).is_contiguous()
        if self.channels_last or last:
            rows = x.movedim(1, -1)
            y = self._normalised(rows.reshape(-1, rows.shape[-1]), x.shape[0])
            return y.view(rows.shape).movedim(-1, 1)
        return self._normalised(x.reshape(x.shape[0], x.shape[1], -1), x.shape[0]).view(x.shape)

    def _normalised(self, v: Tensor, examples: int) -> Tensor:
        """v [rows, channels], the rows of an example one after the other, or [n, channels, L]."""
        channels = v.shape[1]
        w = self.weight.to(v.dtype) if self.weight is not None else v.new_ones(channels)
        b = self.bias.to(v.dtype) if self.bias is not None else v.new_zeros(channels)
        call = _NORMALISING.get() or Normalising()
        how = call.statistics
        if self.constant or how.source == "frozen":
            if call.seen is not None:
                call.seen[self] = _moments(v) if call.real is None else _known_moments(v, examples, call.real)
            mean, var = (self.get_buffer(f"running_{key}").to(v.dtype) for key in ("mean", "var"))
            return _affine(v, mean, var, w, b, self.eps)
        among = how.reference if how.source == "first" else examples // how.groups
        if v.numel() // channels // examples * among == 1:
            raise ValueError(
                f"BatchNorm over {channels} channels gets one value per channel to normalise by: a larger support set "
                "(or batch), running statistics (norm 'frozen') or another normalisation wanted"
            )
        if call.real is not None:
            return self._without_padding(v, examples, call, w, b)
        if call.seen is not None:
            call.seen[self] = _moments(v)
        if how.source == "first":
            return _affine(v, *_moments(v[: v.shape[0] // examples * how.reference]), w, b, self.eps)
        if how.groups == 1:
            y: Tensor = _Normalise.apply(v, w, b, self.eps)[0]  # type: ignore[no-untyped-call]
            return y
        grouped = v.view(how.groups, -1, *v.shape[1:])
        over = [1] if v.ndim == 2 else [1, 3]
        centred = grouped - grouped.mean(over, keepdim=True)
        scale = w * ((centred * centred).mean(over) + self.eps).rsqrt()  # [groups, channels]
        channel = (v.shape[1],) if v.ndim == 2 else (v.shape[1], 1)
        return (centred * scale.view(-1, 1, *channel) + b.view(channel)).view(v.shape)

    def _without_padding(self, v: Tensor, examples: int, call: Normalising, w: Tensor, b: Tensor) -> Tensor:
        how, real = call.statistics, call.real
        assert real is not None
        each = _by_example(v, examples)
        known, grouped = (how.reference, 1) if how.source == "first" else (examples, how.groups)
        mean, var = _weighted(each[:known].reshape(grouped, -1, *each.shape[1:]), real[:known].view(grouped, -1))
        if grouped == 1:
            if call.seen is not None:
                call.seen[self] = (mean[0], var[0])
            return _affine(v, mean[0], var[0], w, b, self.eps)
        scale = w * (var + self.eps).rsqrt()  # [groups, channels]
        centred = each.reshape(grouped, -1, *each.shape[1:]) - mean[:, None, :, None]
        y: Tensor = (centred * scale[:, None, :, None] + b[:, None]).flatten(0, 1)
        return y.transpose(1, 2).reshape(v.shape) if v.ndim == 2 else y
