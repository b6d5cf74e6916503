"""The inner loop: k differentiable steps from θ to φ — the heart of the project."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import ClassVar, NamedTuple, TypeAlias, TypeGuard, TypeVar

import numpy as np
from torch import Tensor

from envs.base import Arrays
from learners.base import Data, Explores, Gradient, Learner, Meta, Metrics, Objective, Params
from learners.engine import tree
from learners.engine.derivative import constant, differentiate, differentiate_with
from learners.engine.memory import recomputed
from learners.engine.optimisers import SGD, Optimiser

T = TypeVar("T")


Loss: TypeAlias = Callable[[Params, int], Tensor]
"""Of parameters, at inner step number k."""
Direction: TypeAlias = Callable[[Params, int], Params]
"""From a gradient, at inner step number k, to what the inner optimiser descends."""


class Point(NamedTuple):
    """Where an inner loop stands after k steps."""

    params: Params
    """φ_k."""
    state: Params
    """The inner optimiser's state."""
    losses: tuple[Tensor, ...]
    """Support losses at φ₀ … φ_{k−1}."""


def descend(
    loss: Loss,
    theta: Params,
    steps: int,
    optimiser: Optimiser,
    lr: Callable[[int], float],
    *,
    adapts: tuple[str, ...],
    again: bool,
    direction: Direction,
    state: Params | None,
) -> Iterator[Point]:
    """φ₀ = θ, then φ_{k+1} = optimiser(φ_k, direction(∇ loss(φ_k, k), k)), `steps` times.

    Only parameters whose name matches a pattern of `adapts` move; the others stay θ's. `again`: φ will be
    differentiated through (second order). `direction` turns gradients into what the optimiser descends (Meta-SGD:
    α ∘ g). `lr` may depend on the step. `state`: the optimiser's, where it does not begin anew.
    """
    moving, still = partition(theta, adapts)
    state = optimiser.init(moving) if state is None else state
    losses: tuple[Tensor, ...] = ()
    yield Point(theta, state, losses)

    def advanced(moving: Params, state: Params, step: int) -> tuple[Params, Params, Tensor]:
        grads, value = _inner_gradient(lambda p: loss(still | p, step), moving, again)
        return *optimiser.update(moving, direction(grads, step), state, lr(step)), value

    for step in range(steps):
        moving, state, value = (recomputed(advanced) if again else advanced)(moving, state, step)
        losses = (*losses, value)
        # In θ's order of names: what depends on the order (flattening, summing norms) must not depend on `adapts`.
        yield Point({k: moving.get(k, v) for k, v in theta.items()}, state, losses)


def _inner_gradient(loss: Callable[[Params], Tensor], at: Params, again: bool) -> tuple[Params, Tensor]:
    grads, value = differentiate(loss, at, again)
    return constant("inner gradient", lambda: grads), value


class InnerLoop(ABC):
    """φ_{k+1} = optimiser(φ_k, C(∇ L(φ_k))), φ₀ = θ, and ∇θ L_Q(φ_K(θ)) over everything in `meta.params`.

    A learner is what it says of this differently: the loss L that inner steps descend (`inner_loss`), the `direction`
    C, the `step_size`, the `optimiser`, whether φ is differentiated through (`again`), and the outer loss.
    """

    inner_steps: int
    adapts: tuple[str, ...]
    order: int = 2
    """2: the inner loop is differentiated through; 1: its gradients are constants."""
    single_loss: ClassVar[bool] = False
    """Whether the outer loss is that of the query after the last inner step and nothing else, so that an objective may
    add to it."""

    def points(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Iterator[Point]:
        """φ₀ … φ_steps with all that goes with them."""
        return descend(
            self.inner_loss(meta, objective, data, steps), model_params(meta.params), steps, self.optimiser(),
            self.step_size, adapts=self.adapts, again=self.again(meta), direction=self.direction(meta),
            state=self.state(meta),
        )  # fmt: skip

    def inner_loss(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Loss:
        """What each of `steps` inner steps descends: the support's loss."""
        return lambda p, step: objective.support(meta.slots | p, data, step)

    def direction(self, meta: Meta) -> Direction:
        """What an inner step makes of its gradient: by default nothing else."""
        return lambda grads, step: grads

    def step_size(self, step: int) -> float:
        """The inner rate at a step; 1 where `direction` holds the rates."""
        return 1.0

    def optimiser(self) -> Optimiser:
        """The inner optimiser."""
        return SGD()

    def state(self, meta: Meta) -> Params | None:
        """Where the inner optimiser begins; None: anew."""
        return None

    def again(self, meta: Meta) -> bool:
        """Whether φ will be differentiated through."""
        return self.order == 2

    def outer_loss(self, meta: Meta, objective: Objective, data: Data) -> tuple[Tensor, Metrics]:
        """What `gradient` differentiates, and scalars to log."""
        end = last(self.points(meta, objective, data, self.inner_steps))
        loss = objective.query(meta.slots | end.params, data)
        if isinstance(objective, Explores):
            loss = loss + objective.exploration_loss(meta.slots | model_params(meta.params), data)
        return loss, support_losses(end)

    def init(self, params: Params, rng: np.random.Generator) -> Meta:
        return Meta(params, {})

    def draw(self, data: Arrays, rng: np.random.Generator, steps: int) -> Arrays:
        return data

    def path(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Iterator[Params]:
        return (point.params for point in self.points(meta, objective, data, steps))

    def adapt(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Params:
        return last(self.path(meta, objective, data, steps))

    def gradient(self, meta: Meta, objective: Objective, data: Data) -> Gradient:
        grads, loss, metrics = differentiate_with(
            lambda p: self.outer_loss(Meta(p, meta.slots), objective, data), meta.params
        )
        return Gradient(
            grads, self.slots(meta, objective, data), {"query_loss": loss, "grad_norm": tree.norm(grads)} | metrics
        )

    def slots(self, meta: Meta, objective: Objective, data: Data) -> Params:
        """This task's new slots: the objective's."""
        return meta.slots | objective.track(meta.slots | model_params(meta.params), data)

    def claim(self) -> str:
        return "second order" if self.order == 2 else "first order"

    def passes(self) -> int:
        """K inner gradients, as many more to differentiate through them, and the query's."""
        return self.inner_steps * (2 if self.claim() == "second order" else 1) + 1

    def at_test(self) -> Learner:
        return self


def single_loss(learner: Learner) -> TypeGuard[InnerLoop]:
    """Whether a learner's outer loss is that of the query after the last inner step, and nothing else
    (`InnerLoop.single_loss`).
    """
    return isinstance(learner, InnerLoop) and learner.single_loss


def support_losses(point: Point) -> Metrics:
    """The support loss at each inner step, to log."""
    return {f"support_loss_step{k}": loss for k, loss in enumerate(point.losses)}


def model_params(params: Params) -> Params:
    """θ without what a learner has put beside it, which stands under `prefix/name`."""
    return {k: v for k, v in params.items() if "/" not in k}


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
