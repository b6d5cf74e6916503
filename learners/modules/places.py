"""Where a module holds its tensors: copies of it, other tensors in their stead, and what its constants are known by."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from learners.base import Params
from learners.engine.derivative import transformed
from learners.modules.normalisation import BatchNorm

Slot: TypeAlias = tuple[dict[str, Any], str, str]
"""(a module's dictionary, the key in it, the tensor's name)."""


@contextmanager
def swapped(slots: list[Slot], params: Params, last: bool) -> Iterator[None]:
    """Inside, every place that holds a tensor named in `params` holds that of `params`; `last`: images are in
    channels-last memory.
    """
    before = [(place, key, place[key]) for place, key, name in slots if name in params]
    try:
        for place, key, name in slots:
            if name in params:
                value = params[name]
                place[key] = value if (last and not transformed()) or value.ndim != 4 else row_major(value)
        yield
    finally:
        for place, key, value in before:
            place[key] = value


def cast_constants(module: nn.Module, slots: list[Slot], required: Set[str], dtype: torch.dtype) -> None:
    """Put what is not among the names `required` into a dtype; BatchNorm casts by itself."""
    norms = {id(d) for m in module.modules() if isinstance(m, BatchNorm) for d in (m._buffers, m._parameters)}
    done: Params = {}
    for place, key, name in slots:
        value = place[key]
        if name in required or id(place) in norms or not value.is_floating_point():
            continue
        new = done.setdefault(name, value.detach().to(dtype))
        place[key] = nn.Parameter(new, requires_grad=False) if isinstance(value, nn.Parameter) else new


def copied(module: nn.Module) -> nn.Module:
    """A deep copy; what hooks compute anew at each call (older reparametrisations' weights) is copied as a constant."""
    computed = [
        v for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor) and v.grad_fn is not None
    ]
    return copy.deepcopy(module, {id(v): v.detach().clone() for v in computed})


def twin(module: nn.Module) -> nn.Module:
    """A copy with modes of its own, whose parameters, buffers and BatchNorm layers are the very same."""
    shared = [*module.parameters(), *module.buffers(), *(m for m in module.modules() if isinstance(m, BatchNorm))]
    return copy.deepcopy(module, {id(v): v for v in shared})


def slots_of(module: nn.Module) -> list[Slot]:
    """(place, key, name) of everything registered: a tensor that stands in several places has one name."""
    names: dict[int, str] = {}
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        names.setdefault(id(value), name)
    return [
        (place, key, names[id(value)])
        for m in module.modules()
        for place in (m._parameters, m._buffers)
        for key, value in place.items()
        if value is not None
    ]


def known_by(constants: Params) -> str:
    """Number, bytes and hash; "" where there are none."""
    seen = hashlib.blake2b(digest_size=8)
    for name, value in constants.items():
        seen.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        seen.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    size = sum(v.nbytes for v in constants.values())
    return f"{len(constants)} constants of {size} bytes ({seen.hexdigest()})" if constants else ""


def row_major(value: Tensor) -> Tensor:
    """In torch's own layout; by its strides too where axes of size 1 leave them open, which kernels look at."""
    return value.contiguous().flatten().view(value.shape)


def is_channels_last(p: Tensor) -> bool:
    """Whether a convolution's weight stands in that memory format, beyond doubt."""
    return p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
