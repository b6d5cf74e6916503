"""Regression on sine waves: the task family of the MAML paper and the frequency-varying one of Meta-SGD's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from envs.base import Array, Arrays, Predict, check_split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

X_LOW, X_HIGH = -5.0, 5.0


@dataclass(frozen=True)
class Sinusoid:
    """y = A sin(ω x − b), x ~ U[−5, 5], A ~ U[0.1, 5], b ~ U[0, π], without noise  (Finn et al. 2017, §5.1).

    ω = 1 in MAML's family. Meta-SGD's (Li et al. 2017, §4.1; there y = A sin(ω x + b)) draws ω ~ U[0.8, 1.2]:
    `frequency = (0.8, 1.2)`, `phase = (-π, 0)`. The splits differ in their random numbers only.
    """

    shots: int = 10
    """Support points per task (K)."""
    queries: int = 10
    """Query points per task in training."""
    test_queries: int = 100
    """Query points per task in validation and test."""
    train_shots: int = 0
    """If positive, training tasks are this many points and no query set (Reptile)."""
    amplitude: tuple[float, float] = (0.1, 5.0)
    """Range of A."""
    phase: tuple[float, float] = (0.0, np.pi)
    """Range of b, subtracted from ω x."""
    frequency: tuple[float, float] = (1.0, 1.0)
    """Range of ω."""

    def __post_init__(self) -> None:
        for name, least in (("shots", 1), ("queries", 1), ("test_queries", 1), ("train_shots", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least} wanted")

        for name in ("amplitude", "phase", "frequency"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}=({low}, {high}): the lower end first wanted")

    @property
    def kind(self) -> Literal["regression"]:
        return "regression"

    @property
    def inputs(self) -> tuple[int, ...]:
        return (1,)

    @property
    def outputs(self) -> int:
        return 1

    def prepare(self) -> None:
        """Nothing to fetch."""

    def sample(self, split: str, rng: np.random.Generator) -> Arrays:
        check_split(split)
        k, queries = self.shots, self.queries if split == "train" else self.test_queries
        if split == "train" and self.train_shots:
            k, queries = self.train_shots, 0
        (a0, a1), (b0, b1), (w0, w1) = self.amplitude, self.phase, self.frequency
        a, b, w = rng.random(3) * (a1 - a0, b1 - b0, w1 - w0) + (a0, b0, w0)
        x = X_LOW + (X_HIGH - X_LOW) * rng.random((k + queries, 1))
        y = a * np.sin(w * x - b)
        x, y = x.astype(np.float32), y.astype(np.float32)
        task: Arrays = {"support_x": x[:k], "support_y": y[:k]}
        return task | {"query_x": x[k:], "query_y": y[k:]} if queries else task

    def picture(self, tasks: list[Arrays], predict: list[Predict], steps: list[int]) -> Figure:
        from matplotlib.figure import Figure

        grid = np.linspace(X_LOW, X_HIGH, 200, dtype=np.float32)[:, None]
        figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
        for i, (task, outputs) in enumerate(zip(tasks, predict, strict=True)):
            axes = figure.add_subplot(1, len(tasks), i + 1)
            x, y = _curve(task)
            axes.plot(x, y, "k-", linewidth=2, label="true curve")
            for step, output, style in zip(steps, outputs(grid), ("C7:", "C1--", "C0-"), strict=False):
                axes.plot(
                    grid,
                    output[:, :1],
                    style,  # a log variance may stand beside it
                    label="before" if step == 0 else f"after {step} step{'s' * (step > 1)}",
                )
            axes.plot(task["support_x"], task["support_y"], "C3^", label="support points")
            axes.set(xlabel="x", title=f"held-out task {i}", xlim=(X_LOW, X_HIGH))
        figure.axes[0].set_ylabel("y")
        figure.axes[0].legend(fontsize="small")
        return figure


def _curve(task: Arrays) -> tuple[Array, Array]:
    """The true curve, as far as the task's own points show it."""
    x = np.concatenate([task["support_x"], task["query_x"]])[:, 0]
    y = np.concatenate([task["support_y"], task["query_y"]])[:, 0]
    order = np.argsort(x)
    return x[order], y[order]
