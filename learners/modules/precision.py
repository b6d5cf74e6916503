"""Half the digits: what of a model computes with bfloat16 numbers, and what of torch is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from learners.engine import tree
from learners.modules.attention import attention_with

Precision: TypeAlias = Literal["full", "bfloat16-mixed", "bfloat16"]
"""How a module computes: in the dtype of its parameters; with products and convolutions of bfloat16 numbers
(`torch.autocast`); or throughout in bfloat16. θ, outputs, losses and all sums over tasks keep the dtype of θ."""

CONVOLUTIONS = frozenset((
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
))  # fmt: skip
NORMALISATIONS = frozenset((F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm))


@contextmanager
def computing(precision: Precision, device: str) -> Iterator[None]:
    """Inside, a module computes so, its parameters and inputs being in the dtype that it begins with."""
    if precision == "full":
        yield
        return
    with Rounding(), torch.autocast(device, torch.bfloat16, precision == "bfloat16-mixed", cache_enabled=False):
        yield


def cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Floating-point numbers in a dtype; anything else as it is."""
    return value.to(dtype) if value.is_floating_point() else value


class Rounding(TorchFunctionMode):
    """Inside, functions of bfloat16 numbers whose derivatives torch 2.13 gets wrong are computed another way.

    Convolutions on a CPU: as those of float32 numbers, rounded, which is what they are meant to be, products of
    bfloat16 numbers added in float32. Torch's own have wrong second derivatives there (of 3×3 ones with stride 1, by
    their whole size). Normalisations: in float32, as autocast has them on a GPU. Attention: outside of autocast, which
    under vmap meets the pieces that it falls into, and mixes their dtypes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = next((v.device.type for v in tree.leaves((args, kwargs))), "cpu")
        mixed = torch.is_autocast_enabled(device)
        if func is F.multi_head_attention_forward:
            with self:
                return attention_with(lambda weights, p: weights, *args, **kwargs)
        if not mixed and not any(v.dtype == torch.bfloat16 for v in tree.leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func in CONVOLUTIONS and device == "cpu":
            return self._apart(func, args, kwargs, torch.bfloat16, torch.float32).to(torch.bfloat16)
        if func in NORMALISATIONS:
            y = self._apart(func, args, kwargs, torch.float32)
            return y if mixed else y.to(torch.bfloat16)
        if func is F.scaled_dot_product_attention:
            return self._apart(func, args, kwargs, torch.bfloat16)
        return func(*args, **kwargs)

    def _apart(self, func: Any, args: Any, kwargs: Any, *dtypes: torch.dtype) -> Tensor:
        """func outside of autocast, of numbers in these dtypes one after the other."""
        for dtype in dtypes:
            args, kwargs = tree.mapped(partial(cast, dtype=dtype), (args, kwargs))
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            result: Tensor = func(*args, **kwargs)
        return result
