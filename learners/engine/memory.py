"""Memory: the layout of images, and what becomes of freed blocks."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def channels_last(tensor: Tensor) -> Tensor:
    """Images and convolution weights in channels-last memory; anything else as it is."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks up to 32 MiB instead of returning them page by page (a fifth of a Conv4
    step).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 2**31 - 1)
