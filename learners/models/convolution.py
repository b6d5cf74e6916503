"""Convolutions that are fast, and safe, on a CPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from learners.engine.derivative import transformed

PATCH_INPUTS = 32  # in_channels · kernel area up to which the matrix product over patches wins


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
            type(layer) is nn.Conv2d
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
