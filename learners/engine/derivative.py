"""One derivative, two engines.

Outside of torch's function transforms plain autograd is the fastest: the outermost derivative builds no graph,
which `torch.func.grad` always does. Under `torch.vmap`, and while tracing for the compiler, only `torch.func.grad`
works. `execution` says which engine is on; learners call `differentiate` and never know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from learners.base import Metrics, Params

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


def root(v: Tensor) -> Tensor:
    """√v, whose derivative at 0 is 0: of √g² = |g| at g = 0 one of its subgradients, where autograd says 0 · ∞."""
    if not v.requires_grad and not transformed():
        return v.sqrt()
    there = v > 0
    return torch.where(there, torch.where(there, v, 1).sqrt(), 0)


def differentiate(loss: Callable[[Params], Tensor], at: Params, again: bool = False) -> tuple[Params, Tensor]:
    """(∇ loss(at), loss(at)).

    `again`: the result will itself be differentiated (the inner steps of second-order MAML). Otherwise the
    gradient is a constant. Parameters that the loss does not touch get a zero gradient.
    """
    grads, value, _ = differentiate_with(lambda p: (loss(p), {}), at, again)
    return grads, value


def differentiate_with(
    loss: Callable[[Params], tuple[Tensor, Metrics]], at: Params, again: bool = False
) -> tuple[Params, Tensor, Metrics]:
    """`differentiate` for a loss that also tells what it met on the way: (∇, value, metrics), the metrics constant."""
    # Nobody above can differentiate once more where grad mode is off: evaluation builds no second graph.
    again = again and torch.is_grad_enabled()
    with torch.enable_grad():
        if transformed():
            grads, (value, metrics) = torch.func.grad_and_value(loss, has_aux=True)(at)
        else:
            leaves = _attached(at) if again else _leaves(at)
            value, metrics = loss(leaves)
            found = torch.autograd.grad(value, list(leaves.values()), create_graph=again, materialize_grads=True)
            grads = dict(zip(leaves, found, strict=True))
    if not again:
        grads, value = {k: g.detach() for k, g in grads.items()}, value.detach()
    return grads, value, {k: v.detach() for k, v in metrics.items()}


def linearised(loss: Callable[[Params], Tensor], at: Params) -> Callable[[Params], Params]:
    """v ↦ H v with H the Hessian of `loss` at `at`, a constant; the gradient's graph is built once for all v."""
    if transformed():
        pull = torch.func.vjp(torch.func.grad(loss), at)[1]
        return lambda v: {k: h.detach() for k, h in pull({k: v[k] for k in at})[0].items()}
    with torch.enable_grad():
        leaves = _leaves(at)
        grads = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True, materialize_grads=True)

    def product(v: Params) -> Params:
        # A gradient that does not depend on θ at all has no graph; its rows of H are zero.
        with_graph = [(g, v[k]) for k, g in zip(leaves, grads, strict=True) if g.requires_grad]
        if not with_graph:
            return {k: torch.zeros_like(x) for k, x in v.items()}
        outputs, weights = zip(*with_graph, strict=True)
        found = torch.autograd.grad(outputs, list(leaves.values()), weights, retain_graph=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    return product


def gauss_newton(
    function: Callable[[Params], Tensor], at: Params, metric: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Params], Params]:
    """v ↦ Jᵀ F J v, a constant: J the Jacobian of `function` at `at`, `metric(value, u)` = F u at that value.

    With plain autograd J v is the derivative of Jᵀz with respect to z, so that one graph serves all v.
    """
    if transformed():

        def transform(v: Params) -> Params:
            value, moved = torch.func.jvp(function, (at,), (v,))  # type: ignore[misc]
            (product,) = torch.func.vjp(function, at)[1](metric(value, moved))
            return {k: p.detach() for k, p in product.items()}

        return transform
    with torch.enable_grad():
        leaves = _leaves(at)
        inputs, value = list(leaves.values()), function(leaves)
        z = torch.zeros_like(value, requires_grad=True)
        back = torch.autograd.grad(value, inputs, z, create_graph=True, materialize_grads=True)

    def product(v: Params) -> Params:
        (moved,) = torch.autograd.grad(back, z, [v[k] for k in leaves], retain_graph=True, materialize_grads=True)
        found = torch.autograd.grad(
            value, inputs, metric(value, moved).detach(), retain_graph=True, materialize_grads=True
        )
        return dict(zip(leaves, found, strict=True))

    return product


Kind = Literal["inner gradient", "attack"]


@dataclass
class Tape:
    """Remembers quantities that an algorithm takes for constants, so that a second run has the same ones.

    What "first order" means is just this: the inner gradients stay what they were while θ moves. The gradient guard
    compares with finite differences taken so.
    """

    kinds: frozenset[Kind]
    values: list[Params] = field(default_factory=list)
    position: int | None = None
    """Next value to give back; None while recording."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """One run of the computation: the first records, later ones get the recorded values in the same order."""
        self.position = 0 if self.values else None
        token = _TAPE.set(self)
        try:
            yield
        finally:
            _TAPE.reset(token)


_TAPE: ContextVar[Tape | None] = ContextVar("_TAPE", default=None)


def constant(kind: Kind, compute: Callable[[], Params]) -> Params:
    """`compute()`; or, under a tape of this kind, what it was in the tape's first run."""
    tape = _TAPE.get()
    if tape is None or kind not in tape.kinds:
        return compute()
    if tape.position is None:
        tape.values.append({k: v.detach() for k, v in compute().items()})
        return tape.values[-1]
    tape.position += 1
    return tape.values[tape.position - 1]


def _attached(params: Params) -> Params:
    """What is a function of something stays that."""
    return {k: v if v.requires_grad else v.detach().requires_grad_() for k, v in params.items()}


def _leaves(params: Params) -> Params:
    return {k: v.detach().requires_grad_() for k, v in params.items()}
