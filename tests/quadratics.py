"""Quadratic tasks, whose inner and outer loops have closed forms: what algorithms are tested against.

L_S = ½(θ−a)ᵀA(θ−a) and L_Q = ½(θ−b)ᵀB(θ−b). T1, T2 and the scalar task are those of the oracle tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from learners.base import Data, Metrics, Params


@dataclass(frozen=True)
class Quadratic:
    """The objective; a task's data are A, a, B, b, or sequences A [k, n, n], a [k, n] of minibatches.

    θ is the entries of the parameters `names`, one after the other.
    """

    names: tuple[str, ...] = ("theta",)

    def support(self, params: Params, data: Data, step: int) -> torch.Tensor:
        a, A = data["a"], data["A"]
        if A.ndim == 3:
            a, A = a[step], A[step]
        return _half_square(self._theta(params), a, A)

    def query(self, params: Params, data: Data) -> torch.Tensor:
        return _half_square(self._theta(params), data["b"], data["B"])

    def _theta(self, params: Params) -> torch.Tensor:
        return torch.cat([params[name].reshape(-1) for name in self.names])

    def measure(self, params: Params, data: Data) -> Metrics:
        return {"loss": self.query(params, data)}

    def slots(self) -> Params:
        return {}

    def track(self, params: Params, data: Data) -> Params:
        return {}

    def to(self, device: str) -> Quadratic:
        return self

    def summary(self) -> str:
        return "quadratic"


def _half_square(theta: torch.Tensor, centre: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    d = theta - centre
    return 0.5 * d @ (matrix @ d)


def tensors(**values: object) -> Data:
    return {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}


T1 = tensors(A=[[3, 1], [1, 2]], a=[1, -1], B=[[2, 0], [0, 1]], b=[0, 2])
T2 = tensors(A=[[1, 0], [0, 4]], a=[-1, 0.5], B=[[1, 0.5], [0.5, 2]], b=[1, 1])
SCALAR = tensors(A=[[3]], a=[1], B=[[2]], b=[-1])
THETA = {"theta": torch.tensor([2.0, 1.0], dtype=torch.float64)}
ALPHA = 0.1


def stack(*tasks: Data) -> Data:
    return {k: torch.stack([t[k] for t in tasks]) for k in tasks[0]}


class QuadraticTasks:
    """A task family of random well-conditioned quadratics in n dimensions."""

    def __init__(self, n: int = 3) -> None:
        self.n = n

    def sample(self, split: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
        def positive() -> np.ndarray:
            m = rng.normal(size=(self.n, self.n))
            return np.eye(self.n) + m @ m.T / self.n

        return {"A": positive(), "a": rng.normal(size=self.n), "B": positive(), "b": rng.normal(size=self.n)}
