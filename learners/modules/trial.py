"""One dry run of a module: whether it is a function of its parameters and inputs, and what it must be called with."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from learners.engine.derivative import transformed
from learners.engine.tree import leaves, mapped
from learners.modules.convolution import SafeCalls
from learners.modules.draws import Drawing, Draws, Still

T = TypeVar("T")


@dataclass(frozen=True)
class Findings:
    """What a dry run has shown."""

    draws: bool = False
    """Draws random numbers in training, which `learners.modules.draws` gives it."""
    attends: bool = False
    """Calls fused attention, whose kernels have no second derivative."""


def tried(module: nn.Module, x: Any, *, quiet: bool) -> Findings:
    """Run `module` on inputs like x, a tensor or keyword arguments; `quiet`: it is never to draw.

    Twice, under different states of every generator. Raises ValueError with the layer's name where the two differ,
    where it draws what nothing stands in for, or writes a buffer: an inner loop must be a function of its arguments;
    and for a convolution whose gradient would leave its memory.
    """
    return apart(lambda: _tried(module, _inputs(module, x), quiet))


def _tried(module: nn.Module, x: Any, quiet: bool) -> Findings:
    mine = [Draws(torch.zeros((), dtype=torch.int64, device=_device(module, x)), 0) for _ in range(2)]
    before = {name: (b, b.clone()) for name, b in module.named_buffers()}
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    outputs, attends = [], False
    for seed, draws in enumerate(mine):
        with torch.no_grad(), _generators(seed), _names(module) as names, _Watch(names, quiet) as watch:
            with Still() if quiet else Drawing(draws):
                outputs.append(leaves(called(module, x)))
        attends |= watch.attends
        if not seed:  # what the first call alone fills (tables of sines) is a constant after it
            before |= {
                name: (b, b.clone()) for name, b in module.named_buffers() if before.get(name, (None,))[0] is not b
            }
    for name, buffer in module.named_buffers():
        old, value = before.get(name, (None, None))
        if value is None or (buffer is not old and buffer.shape != value.shape) or not _equal(buffer, value):
            raise ValueError(
                f"{_whose(module, name)} keeps state between calls: its forward writes the buffer "
                f"{name.rpartition('.')[2]!r}; an adapted model must be a function of its parameters"
            )
    for name, parameter in module.named_parameters():
        if not _equal(parameter.detach(), weights[name]):
            raise ValueError(
                f"{_whose(module, name)} writes the parameter {name.rpartition('.')[2]!r} in its forward; an adapted "
                "model must be a function of its parameters"
            )
    if not all(_equal(a, b) for a, b in zip(*outputs, strict=True)):
        raise ValueError(
            f"{type(module).__name__} gives different outputs for the same inputs: it draws random numbers or keeps "
            "state between calls; an adapted model must be a function of its parameters"
        )
    return Findings(mine[0].calls > 0, attends)


def called(module: nn.Module, x: Any) -> Any:
    """`module` on a tensor, or on keyword arguments."""
    return module(**x) if isinstance(x, dict) else module(x)


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Inside, attention is computed by kernels that have second derivatives."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Watch(SafeCalls):
    """Sees fused attention; raises ValueError for a draw, with the name of the layer."""

    def __init__(self, names: list[str], quiet: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names, self.quiet, self.attends = names, quiet, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in func.name() or "transformer_encoder_layer_fwd" in func.name():
            self.attends = True
        elif torch.Tag.nondeterministic_seeded in func.tags or "fractional_max_pool" in func.name():
            instead = (
                "in evaluation mode too: a draw only where self.training wanted"
                if self.quiet
                else "that nothing stands in for: remove it, draw them in the task's data, or take them from "
                "torch.rand, randn, bernoulli or a dropout, which are given the task's own"
            )
            raise ValueError(f"{self.names[-1]} draws random numbers ({func.name()}) {instead}")
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def _names(module: nn.Module) -> Iterator[list[str]]:
    """Inside, the list ends with the layer that runs."""
    running, hooks = [f"the forward of {type(module).__name__}"], []
    for name, layer in module.named_modules():
        if name:
            text = f"layer {name!r} ({type(layer).__name__})"
            hooks.append(layer.register_forward_pre_hook(lambda _m, _x, text=text: running.append(text)))
            hooks.append(layer.register_forward_hook(lambda _m, _x, _y: running.pop() and None))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _generators(seed: int) -> Iterator[None]:
    """Inside, the global generators of torch, numpy and Python stand somewhere else."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _inputs(module: nn.Module, x: Any) -> Any:
    """Inputs that can be run on: x itself, where it is plain; else of its shapes and dtypes."""
    like = next(module.parameters(), None)

    def one(v: Tensor) -> Tensor:
        device = v.device if like is None else like.device
        plain = type(v) is Tensor and not transformed() and not torch._C._functorch.is_functorch_wrapped_tensor(v)
        if plain and v.device.type != "meta":
            v = v.detach().to(device)
        elif v.is_floating_point():
            v = torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(
                device, v.dtype
            )
        else:
            v = torch.full(v.shape, v.dtype == torch.bool, dtype=v.dtype, device=device)
        return v.to(like.dtype) if v.is_floating_point() and like is not None and like.is_floating_point() else v

    return mapped(one, x)


def _device(module: nn.Module, x: Any) -> torch.device:
    like = next(module.parameters(), None)
    return leaves(x)[0].device if like is None else like.device


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.device.type == "meta" or (a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()))


def _whose(module: nn.Module, buffer: str) -> str:
    owner = buffer.rpartition(".")[0]
    kind = type(module.get_submodule(owner)).__name__
    return f"layer {owner!r} ({kind})" if owner else kind


def apart(run: Callable[[], T]) -> T:
    """`run()` in a thread of its own, which neither vmap's levels nor a tracer's modes reach."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()
