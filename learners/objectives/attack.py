"""Adversarial examples: inputs moved within an ε-ball so that a loss grows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from envs.base import Arrays
from learners.base import Data, Metrics, Objective, Params
from learners.engine import tree
from learners.engine.derivative import constant, differentiate


@dataclass(frozen=True)
class Attack:
    """x_{j+1} = Π( x_j + η sign ∇_x L(x_j) ), Π into the ball |x' − x|_∞ ≤ ε and into [low, high].

    One step of η = ε is FGSM (Goodfellow et al. 2015), several are PGD (Madry et al. 2018). Inputs are as tasks give
    them: pixels in [0, 1], before anything a model may do to normalise them. sign(0) = 0. The result is a constant;
    for FGSM that is exact almost everywhere, since the sign's derivative is zero.
    """

    eps: float = 2 / 255
    """ε, in units of the inputs."""
    steps: int = 1
    """Gradient steps: 1 is FGSM."""
    step_size: float = 0.0
    """η; 0: ε / min(steps, 8)."""
    random_start: bool = False
    """Start at a random point of the ball, drawn with the task."""
    low: float = 0.0
    """Smallest valid input; −inf where there is none."""
    high: float = 1.0
    """Largest valid input."""

    def __post_init__(self) -> None:
        if self.eps < 0 or self.steps < 1 or self.step_size < 0:
            raise ValueError(
                f"eps={self.eps}, steps={self.steps}, step_size={self.step_size}: 0 or more, 1 or more and 0 or more "
                "wanted"
            )
        if self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}")

    def draw(self, inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random start for these inputs, from U[−ε, ε]; zeros without `random_start`."""
        start = rng.uniform(-self.eps, self.eps, inputs.shape) if self.random_start else np.zeros(inputs.shape)
        return start.astype(inputs.dtype)

    def __call__(self, loss: Callable[[Tensor], Tensor], x: Tensor, start: Tensor | None = None) -> Tensor:
        """Inputs in the ball around x with a larger loss; `start` as `draw` gives it."""
        return constant("attack", lambda: {"x": self._climb(loss, x, start)})["x"]

    def _climb(self, loss: Callable[[Tensor], Tensor], x: Tensor, start: Tensor | None) -> Tensor:
        size = self.step_size or self.eps / min(self.steps, 8)
        at = self._valid(x + start, x) if start is not None else x
        for _ in range(self.steps):
            grads, _ = differentiate(lambda p: loss(p["x"]), {"x": at})
            at = self._valid(at + size * torch.sign(grads["x"]), x)
        return at.detach()

    def _valid(self, at: Tensor, x: Tensor) -> Tensor:
        return torch.clamp(torch.maximum(torch.minimum(at, x + self.eps), x - self.eps), self.low, self.high)


def attacked_query(attack: Attack, objective: Objective, params: Params, data: Data) -> Data:
    """`data` with its query inputs moved against the model at `params`."""
    frozen = tree.apply(Tensor.detach, params)
    x = attack(lambda x: objective.query(frozen, data | {"query_x": x}), data["query_x"], data.get("query_start"))
    return data | {"query_x": x}


@dataclass(frozen=True)
class SupportAttacked:
    """An objective whose support inputs are attacked at the current parameters, at each inner step anew."""

    objective: Objective
    attack: Attack

    def support(self, params: Params, data: Data, step: int) -> Tensor:
        return self.objective.support(params, self.attacked(params, data, step), step)

    def attacked(self, params: Params, data: Data, step: int) -> Data:
        """`data` with its support inputs moved against the model at `params`."""
        frozen = tree.apply(Tensor.detach, params)
        x = self.attack(
            lambda x: self.objective.support(frozen, data | {"support_x": x}, step),
            data["support_x"],
            data.get("support_start"),
        )
        return data | {"support_x": x}

    def query(self, params: Params, data: Data) -> Tensor:
        return self.objective.query(params, data)

    def measure(self, params: Params, data: Data) -> Metrics:
        return self.objective.measure(params, data)

    def slots(self) -> Params:
        return self.objective.slots()

    def track(self, params: Params, data: Data) -> Params:
        return self.objective.track(params, data)

    def to(self, device: str) -> SupportAttacked:
        return SupportAttacked(self.objective.to(device), self.attack)

    def summary(self) -> str:
        return f"{self.objective.summary()}, support attacked"


def drawn_starts(attack: Attack, data: Arrays, rng: np.random.Generator) -> Arrays:
    """Random starts for support and query, where the attack has any."""
    if not attack.random_start:
        return {}
    return {
        f"{part}_start": attack.draw(data[f"{part}_x"], rng) for part in ("support", "query") if f"{part}_x" in data
    }
