"""One derivative, two engines.

Outside of torch's function transforms plain autograd is the fastest: the outermost derivative builds no graph,
which `torch.func.grad` always does. Under `torch.vmap`, and while tracing for the compiler, only `torch.func.grad`
works. `execution` says which engine is on; learners call `differentiate` and never know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from learners.base import Params

_TRANSFORMED: ContextVar[bool] = ContextVar("_TRANSFORMED", default=False)


@contextmanager
def transforms() -> Iterator[None]:
    """Inside, derivatives are taken by `torch.func`, so that they may stand under `torch.vmap`."""
    token = _TRANSFORMED.set(True)
    try:
        yield
    finally:
        _TRANSFORMED.reset(token)


def transformed() -> bool:
    """Whether we are under torch's function transforms, where memory layout is not ours to choose."""
    return _TRANSFORMED.get()


def differentiate(loss: Callable[[Params], Tensor], at: Params, again: bool = False) -> tuple[Params, Tensor]:
    """(∇ loss(at), loss(at)).

    `again`: the result will itself be differentiated (the inner steps of second-order MAML). Otherwise the
    gradient is a constant. Parameters that the loss does not touch get a zero gradient.
    """
    # Nobody above can differentiate once more where grad mode is off: evaluation builds no second graph.
    again = again and torch.is_grad_enabled()
    with torch.enable_grad():
        if transformed():
            grads, value = torch.func.grad_and_value(loss)(at)
        else:
            leaves = at if again and _attached(at) else _leaves(at)
            value = loss(leaves)
            found = torch.autograd.grad(value, list(leaves.values()), create_graph=again, materialize_grads=True)
            grads = dict(zip(leaves, found, strict=True))
    if not again:
        grads, value = {k: g.detach() for k, g in grads.items()}, value.detach()
    return grads, value


def _attached(params: Params) -> bool:
    return all(v.requires_grad for v in params.values())


def _leaves(params: Params) -> Params:
    return {k: v.detach().requires_grad_() for k, v in params.items()}
