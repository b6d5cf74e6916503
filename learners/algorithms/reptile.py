"""Reptile (Nichol, Achiam, Schulman 2018): move θ towards the adapted weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from envs.base import Arrays
from learners.base import Data, Gradient, Learner, Meta, Objective, Params, check_inner_loop
from learners.engine import tree
from learners.engine.optimisers import SGD, Adam, Optimiser
from learners.inner import InnerLoop, Loss, partition, support_losses

MOMENTS = "moments"


@dataclass(frozen=True)
class Reptile(InnerLoop):
    """g = θ − φ_K, to be descended: SGD with rate ε is the paper's θ ← θ + ε · mean(φ − θ)  (§3, batched).

    φ_K is K optimiser steps on minibatches of one set of labelled examples; there is no query set in training. Defaults
    are the published Omniglot 5-way run's: Adam with β₁ = 0 inside. `update = "last_gradient"` is the first-order
    variant of §6.3: g = φ_{K−1} − φ_K, the last step alone.

    moments: Adam's second moment is new for every task ("reset"), or runs on from task to task ("carry"), as in the
    published code, which takes tasks one after the other. Here the tasks of a meta-batch begin from the same moments,
    and the mean of what they end with is carried on: the serial algorithm is `meta_batch = 1`. Adaptation at test
    then begins from the moments of training.
    """

    inner_lr: float = 1e-3
    """Rate of the inner optimiser."""
    inner_steps: int = 5
    """K, inner steps in meta-training."""
    inner_optimizer: Literal["sgd", "adam"] = "adam"
    """Inner optimiser; Adam runs with β₁ = 0, β₂ = 0.999."""
    adam_style: Literal["torch", "tf1"] = "torch"
    """Where Adam's ε stands; "tf1" as in the published code."""
    moments: Literal["reset", "carry"] = "reset"
    """Whether Adam's second moment runs on from task to task."""
    update: Literal["delta", "last_gradient"] = "delta"
    """What is descended: θ − φ_K, or the last step's part of it."""
    batch: int = 10
    """Examples per inner step; 0: the whole support set."""
    test_batch: int = 5
    """Examples per inner step at meta-test; 0: the whole support set."""
    tail: int = 0
    """With "last_gradient": examples set apart for the last step; 0: it takes the next minibatch."""
    adapts: tuple[str, ...] = ("*",)
    """Patterns of the parameters that the inner loop moves."""

    def __post_init__(self) -> None:
        check_inner_loop(self.inner_lr, self.inner_steps)
        if min(self.batch, self.test_batch, self.tail) < 0:
            raise ValueError(f"batch={self.batch}, test_batch={self.test_batch}, tail={self.tail}: 0 or more wanted")
        if self.moments == "carry" and self.inner_optimizer != "adam":
            raise ValueError(f"moments='carry' wants inner_optimizer='adam'; {self.inner_optimizer!r} has none")
        if self.tail and (self.update != "last_gradient" or not self.batch or not self.inner_steps):
            raise ValueError(f"tail={self.tail} wants update='last_gradient', a batch and an inner step")

    def init(self, params: Params, rng: np.random.Generator) -> Meta:
        return Meta(
            params,
            tree.with_prefix(MOMENTS, self.optimiser().init(partition(params, self.adapts)[0]))
            if self._carries
            else {},
        )

    def draw(self, data: Arrays, rng: np.random.Generator, steps: int) -> Arrays:
        if not self.batch or "support_x" not in data:  # an RL task has no examples to choose from, only its episodes
            return data
        examples = len(data["support_x"])
        if not self.tail:
            return data | {"batches": minibatches(np.arange(examples), self.batch, steps, rng)}
        if self.tail >= examples:
            raise ValueError(f"tail={self.tail} leaves none of a task's {examples} examples for the steps before")
        order = rng.permutation(examples)
        return data | {
            "batches": minibatches(order[self.tail :], self.batch, steps, rng),
            "last_batch": order[None, : self.tail],
        }

    def inner_loss(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Loss:
        def loss(p: Params, step: int) -> Tensor:
            if "last_batch" in data and step == steps - 1:
                return objective.support(meta.slots | p, data | {"batches": data["last_batch"]}, 0)
            return objective.support(meta.slots | p, data, step)

        return loss

    def step_size(self, step: int) -> float:
        return self.inner_lr

    def optimiser(self) -> Optimiser:
        return SGD() if self.inner_optimizer == "sgd" else Adam(beta1=0.0, style=self.adam_style)

    def state(self, meta: Meta) -> Params | None:
        return tree.under(MOMENTS, meta.slots) if self._carries else None

    def again(self, meta: Meta) -> bool:
        return False

    def gradient(self, meta: Meta, objective: Objective, data: Data) -> Gradient:
        points = list(self.points(meta, objective, data, self.inner_steps))
        start = points[0] if self.update == "delta" else points[max(self.inner_steps - 1, 0)]
        delta = tree.apply(Tensor.detach, tree.sub(start.params, points[-1].params))
        moments = tree.with_prefix(MOMENTS, points[-1].state) if self._carries else {}
        metrics = {"support_loss": points[-1].losses[-1]} if self.inner_steps else {}
        return Gradient(
            delta,
            self.slots(meta, objective, data) | moments,
            metrics | {"delta_norm": tree.norm(delta)} | support_losses(points[-1]),
        )

    def passes(self) -> int:
        """K inner gradients."""
        return self.inner_steps

    def claim(self) -> str:
        return "θ − φ" if self.update == "delta" else "φ′ − φ"

    def at_test(self) -> Learner:
        return replace(self, batch=self.test_batch, tail=0)

    @property
    def _carries(self) -> bool:
        return self.moments == "carry"


def minibatches(rows: np.ndarray, size: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Row numbers [steps, size] that cycle through all `rows`, reshuffled each time round.

    A minibatch may span two shuffles and then hold an example twice, as in the published code.
    """
    rounds = -(-steps * size // len(rows))
    order = np.concatenate([np.zeros(0, int), *(rng.permutation(rows) for _ in range(rounds))])
    return order[: steps * size].reshape(steps, size)
