"""Layout and normalisation tricks that make convolutions fast on a CPU, so that models stay plain.

`specialise(module)` swaps layers for equal ones; parameters keep their names and values.

- BatchNorm: on the [rows, channels] view, where both passes are contiguous, with a backward pass that is itself
  differentiable. Torch's native one silently returns wrong second-order gradients in two nestings of transforms.
- A convolution over few input channels is one matrix product over its patches.
- Images are channels-last throughout.
"""

from __future__ import annotations

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
    """Mean and biased variance over rows of x [rows, channels], in few passes over memory (torch's `var_mean` is twenty times slower)."""

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


class BatchNorm(nn.Module):
    """Batch normalisation over axis 1 of [n, C], [n, C, L], [n, C, H, W] or [n, C, D, H, W] inputs.

    y = (x − μ)/√(σ² + ε) · weight + bias with the biased variance; μ and σ² from the rows that `statistics` names,
    which whoever calls the module sets. `running_mean` and `running_var` are read only when frozen and never
    written: a batch's own statistics are left in `seen` for the caller.
    """

    def __init__(self, channels: int, eps: float = 1e-5, *, scale: bool = True, shift: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if scale else None
        self.bias = nn.Parameter(torch.zeros(channels)) if shift else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.statistics = BATCH
        self.seen: tuple[Tensor, Tensor] | None = None
        self.record = False

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
        if self.record:
            self.seen = _moments(v)
        how = self.statistics
        if how.source == "frozen":
            return _affine(v, self.get_buffer("running_mean"), self.get_buffer("running_var"), w, b, self.eps)
        if how.source == "first":
            return _affine(v, *_moments(v[: v.shape[0] // examples * how.reference]), w, b, self.eps)
        if how.groups == 1:
            y: Tensor = _Normalise.apply(v, w, b, self.eps)[0]  # type: ignore[no-untyped-call]
            return y
        centred, var = _centred(v.view(how.groups, -1, v.shape[-1]))
        return (centred * (w * (var + self.eps).rsqrt()).unsqueeze(1) + b).view(v.shape)
