"""Reptile (Nichol, Achiam, Schulman 2018): move θ towards the adapted weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from envs.base import Arrays
from learners import inner, tree
from learners.base import Data, Gradient, Learner, Meta, Objective, Params, check_inner_loop
from learners.optimisers import SGD, Adam


@dataclass(frozen=True)
class Reptile:
    """g = θ − φ_K, to be descended: SGD with rate ε is the paper's θ ← θ + ε · mean(φ − θ)  (§3, batched).

    φ_K is K optimiser steps on minibatches of one set of labelled examples; there is no query set in training.
    Defaults are the published Omniglot 5-way run's: Adam with β₁ = 0 inside, its second moment new for every task.
    """

    inner_lr: float = 1e-3
    """Rate of the inner optimiser."""
    inner_steps: int = 5
    """K, inner steps in meta-training."""
    inner_optimizer: Literal["sgd", "adam"] = "adam"
    """Inner optimiser; Adam runs with β₁ = 0, β₂ = 0.999."""
    adam_style: Literal["torch", "tf1"] = "torch"
    """Where Adam's ε stands; "tf1" as in the published code."""
    batch: int = 10
    """Examples per inner step; 0: the whole support set."""
    test_batch: int = 5
    """Examples per inner step at meta-test; 0: the whole support set."""
    adapts: tuple[str, ...] = ("*",)
    """Patterns of the parameters that the inner loop moves."""

    def __post_init__(self) -> None:
        check_inner_loop(self.inner_lr, self.inner_steps)
        if self.batch < 0 or self.test_batch < 0:
            raise ValueError(f"batch={self.batch}, test_batch={self.test_batch}: 0 (the whole support set) or more wanted")

    def init(self, params: Params, rng: np.random.Generator) -> Meta:
        return Meta(params, {})

    def draw(self, data: Arrays, rng: np.random.Generator, steps: int) -> Arrays:
        if not self.batch:
            return data
        return data | {"batches": minibatches(len(data["support_x"]), self.batch, steps, rng)}

    def path(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Iterator[Params]:
        optimiser = SGD() if self.inner_optimizer == "sgd" else Adam(beta1=0.0, style=self.adam_style)
        return inner.path(
            lambda p, step: objective.support(meta.slots | p, data, step),
            meta.params, steps, optimiser, self.inner_lr, adapts=self.adapts, again=False,
        )  # fmt: skip

    def adapt(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Params:
        return inner.last(self.path(meta, objective, data, steps))

    def gradient(self, meta: Meta, objective: Objective, data: Data) -> Gradient:
        phi = self.adapt(meta, objective, data, self.inner_steps)
        delta = tree.apply(lambda d: d.detach(), tree.sub(meta.params, phi))
        slots = meta.slots | objective.track(meta.slots | meta.params, data)
        last = objective.support(meta.slots | phi, data, max(self.inner_steps - 1, 0)).detach()
        return Gradient(delta, slots, {"support_loss": last, "delta_norm": tree.norm(delta)})

    def claim(self) -> str:
        return "θ − φ"

    def at_test(self) -> Learner:
        return replace(self, batch=self.test_batch)


def minibatches(examples: int, size: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Row numbers [steps, size] that cycle through all examples, reshuffled each time round.

    A minibatch may span two shuffles and then hold an example twice, as in the published code.
    """
    rounds = -(-steps * size // examples)
    order = np.concatenate([np.zeros(0, int), *(rng.permutation(examples) for _ in range(rounds))])
    return order[: steps * size].reshape(steps, size)
