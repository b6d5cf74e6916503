"""Convolutions that are fast on a CPU, and those that are not safe there.

torch 2.13's CPU library (oneDNN 3.12) writes out of bounds in the weight gradient of a strided 1×1 convolution over few
channels in channels-last memory (uxlfoundation/oneDNN#6035): it aborts, hangs, or corrupts in silence. conv(x[::s], w)
is the same function and takes another path. `make convolutions` looks for more of the kind on the machine at hand.
"""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from learners.engine.derivative import transformed

PATCH_INPUTS = 32  # in_channels · kernel area up to which the matrix product over patches wins
FEWEST_INPUTS = 16  # channels per group from which on the kernel stays in its bounds: 8 with AVX2, 16 with AVX-512


class Call(NamedTuple):
    """A convolution as torch is asked for it; sizes per axis of space."""

    transposed: bool
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    inputs: int
    """Channels per group that the weight gradient is taken over."""


def unsafe(call: Call) -> bool:
    """Whether a convolution's weight gradient may be computed by the kernel that leaves its memory.

    Images only, in one group, and not transposed: those others pass `make convolutions` on every instruction set.
    """
    strided_pointwise = call.kernel == (1, 1) and max(call.stride) > 1
    return strided_pointwise and not call.transposed and call.groups == 1 and call.inputs < FEWEST_INPUTS


class SafeCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, a convolution that is not safe raises ValueError with what to write instead."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            weight, stride, transposed, groups = args[1], args[3], args[6], args[8]
            # A weight is [out, in / groups, …], of a transposed one [in, out / groups, …].
            call = Call(transposed, tuple(weight.shape[2:]), tuple(stride), groups, weight.shape[1])
            if unsafe(call):
                raise ValueError(
                    f"a convolution of kernel {'×'.join(map(str, call.kernel))} and stride "
                    f"{'×'.join(map(str, call.stride))} over "
                    f"{call.inputs} channels: torch's CPU kernel for its weight gradient writes out of bounds; "
                    "convolve x[..., ::s, ::s] with stride 1 instead, which is the same function"
                )
        return func(*args, **(kwargs or {}))


def is_plain(layer: nn.Module, kind: type[nn.Module], names: Set[str] = frozenset(("weight", "bias"))) -> bool:
    """Whether `layer` is just a `kind`: nothing hangs on it that a layer in its place would lose.

    Hooks, parametrisations and what is registered besides `names` (`weight_orig` of the older
    reparametrisations).
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is kind and not any(hooks) and {*layer._parameters, *layer._buffers} <= names


class PatchConv(nn.Module):
    """nn.Conv2d over few input channels, as one matrix product: patches [n·h·w, c·k·k] times weights."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding, self.kernel = conv.stride, conv.padding, conv.kernel_size
        height, width = (int(p) for p in conv.padding)
        self.pad = (width, width, height, height)

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        """Whether `layer` is a plain convolution small enough per patch."""
        return (
            is_plain(layer, nn.Conv2d)
            and isinstance(layer, nn.Conv2d)
            and layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1] <= PATCH_INPUTS
            and layer.groups == 1
            and layer.dilation == (1, 1)
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        )

    def forward(self, x: Tensor) -> Tensor:
        # Back to the images the patches are slow: by half for three channels (for one channel they still win).
        if x.is_cuda or transformed() or (x.requires_grad and x.shape[1] > 1):
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        kh, kw = self.kernel
        padded = F.pad(x, self.pad)
        patches = padded.unfold(2, kh, self.stride[0]).unfold(3, kw, self.stride[1])  # [n, c, h, w, kh, kw]
        n, c, h, w = patches.shape[:4]
        columns = patches.permute(0, 2, 3, 1, 4, 5).reshape(n * h * w, c * kh * kw)
        # Contiguous: else autograd takes the weight gradient in an orientation that is four times slower.
        y = columns @ self.weight.reshape(self.weight.shape[0], -1).t().contiguous()
        if self.bias is not None:
            y = y + self.bias
        return y.view(n, h, w, -1).permute(0, 3, 1, 2)


class PointwiseConv(nn.Module):
    """A strided 1×1 convolution (of one to three dimensions) as an unstrided one over every s-th position."""

    def __init__(self, conv: nn.modules.conv._ConvNd) -> None:
        super().__init__()
        self.weight, self.bias, self.groups = conv.weight, conv.bias, conv.groups
        self.stride = conv.stride
        assert not isinstance(conv.padding, str)
        self.pad = [p for p in reversed(conv.padding) for _ in range(2)]
        self.convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(conv.stride)]

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        """Whether `layer` is a plain strided 1×1 convolution."""
        return (
            any(is_plain(layer, kind) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
            and isinstance(layer, nn.modules.conv._ConvNd)
            and math.prod(layer.kernel_size) == 1
            and max(layer.stride) > 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        )

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, self.pad) if any(self.pad) else x
        every: tuple[Any, ...] = (..., *(slice(None, None, s) for s in self.stride))
        y: Tensor = self.convolve(padded[every], self.weight, self.bias, groups=self.groups)
        return y
