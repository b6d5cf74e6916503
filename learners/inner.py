"""The inner loop: k differentiable steps from θ to φ — the heart of the project."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor

from learners.base import Params
from learners.derivative import differentiate
from learners.optimisers import Optimiser

T = TypeVar("T")


def path(
    loss: Callable[[Params, int], Tensor],
    theta: Params,
    steps: int,
    optimiser: Optimiser,
    lr: float,
    *,
    adapts: tuple[str, ...] = ("*",),
    again: bool,
) -> Iterator[Params]:
    """φ₀ = θ, then φ_{k+1} = optimiser(φ_k, ∇ loss(φ_k, k)), `steps` times.

    Only parameters whose name matches a pattern of `adapts` move; the others stay θ's. `again`: φ will be
    differentiated through (second order).
    """
    moving, still = partition(theta, adapts)
    state = optimiser.init(moving)
    yield theta
    for step in range(steps):
        grads, _ = differentiate(lambda p, step=step: loss(still | p, step), moving, again)  # type: ignore[misc]
        moving, state = optimiser.update(moving, grads, state, lr)
        # In θ's order of names: what depends on the order (flattening, summing norms) must not depend on `adapts`.
        yield {k: moving.get(k, v) for k, v in theta.items()}


def last(path: Iterator[T]) -> T:
    """The last element of a non-empty iterator."""
    for element in path:
        result = element
    return result


def partition(params: Params, patterns: tuple[str, ...]) -> tuple[Params, Params]:
    """(parameters whose name matches, the others).

    Raises ValueError where nothing matches: an inner loop that moves nothing is a misspelt pattern.
    """
    matching = {k: v for k, v in params.items() if any(fnmatchcase(k, p) for p in patterns)}
    if not matching:
        raise ValueError(f"adapts={list(patterns)} matches none of the parameters {', '.join(params)}")
    return matching, {k: v for k, v in params.items() if k not in matching}
