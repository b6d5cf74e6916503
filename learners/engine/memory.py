"""Memory: the layout of images, what is computed again rather than kept, and what becomes of freed blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

_RECOMPUTING: ContextVar[bool] = ContextVar("_RECOMPUTING", default=False)


@contextmanager
def recomputing(on: bool = True) -> Iterator[None]:
    """Inside, what goes through `recomputed` keeps its arguments only until its derivative is taken."""
    token = _RECOMPUTING.set(on)
    try:
        yield
    finally:
        _RECOMPUTING.reset(token)


def recomputed(function: Callable[..., T]) -> Callable[..., T]:
    """`function`; inside `recomputing`, without its intermediate results, which are computed again when they are needed
    (gradient checkpointing, Chen et al. 2016). The numbers are the same.
    """
    if not (_RECOMPUTING.get() and torch.is_grad_enabled()):
        return function

    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


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
