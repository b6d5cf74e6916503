"""MAML and its first-order variant (Finn, Abbeel, Levine 2017, Algorithms 1–2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from envs.base import Arrays
from learners import inner, tree
from learners.base import Data, Gradient, Learner, Meta, Objective, Params, check_inner_loop
from learners.derivative import differentiate
from learners.optimisers import SGD


@dataclass(frozen=True)
class MAML:
    """φ_{k+1} = φ_k − α ∇L_S(φ_k), φ₀ = θ;  ∇θ L_Q(φ_K) = [Π_k (I − α H_S(φ_k))]ᵀ ∇L_Q(φ_K).

    `order = 1` is FOMAML: the inner gradients are constants, so the product is dropped and ∇L_Q(φ_K) remains.
    α is in units of the objective's loss: a mean cross-entropy wants N times cbfinn's rate (see `Supervised`).
    """

    inner_lr: float = 0.01
    """α, the rate of the inner loop."""
    inner_steps: int = 1
    """K, inner steps in meta-training."""
    order: Literal[2, 1] = 2
    """2: differentiate through the inner loop; 1: first-order approximation (FOMAML)."""
    adapts: tuple[str, ...] = ("*",)
    """Patterns of the parameters that the inner loop moves."""

    def __post_init__(self) -> None:
        check_inner_loop(self.inner_lr, self.inner_steps)

    def init(self, params: Params, rng: np.random.Generator) -> Meta:
        return Meta(params, {})

    def draw(self, data: Arrays, rng: np.random.Generator, steps: int) -> Arrays:
        return data

    def path(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Iterator[Params]:
        return inner.path(
            lambda p, step: objective.support(meta.slots | p, data, step),
            meta.params, steps, SGD(), self.inner_lr, adapts=self.adapts, again=self.order == 2,
        )  # fmt: skip

    def adapt(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Params:
        return inner.last(self.path(meta, objective, data, steps))

    def gradient(self, meta: Meta, objective: Objective, data: Data) -> Gradient:
        grads, loss = differentiate(
            lambda theta: objective.query(meta.slots | self.adapt(Meta(theta, meta.slots), objective, data, self.inner_steps), data),
            meta.params,
        )
        slots = meta.slots | objective.track(meta.slots | meta.params, data)
        return Gradient(grads, slots, {"query_loss": loss, "grad_norm": tree.norm(grads)})

    def claim(self) -> str:
        return "second order" if self.order == 2 else "first order"

    def at_test(self) -> Learner:
        return self
