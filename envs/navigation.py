"""2-D navigation: a point robot that must find a goal it cannot see (Finn et al. 2017, §5.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from envs.base import Arrays, check_split
from envs.rollout import Act, Floats, collect

STEP = 0.1
NEAR = 0.01
HELD_OUT = 40


class PointWorld:
    """position ← position + clip(action, ±0.1);  reward −‖position − goal‖₂ at the new position.

    An episode ends where both coordinates are within 0.01 of the goal. Begins at the origin.
    """

    observations = actions = 2
    ends = True

    def reset(self, tasks: Arrays, counts: list[int], rngs: list[np.random.Generator]) -> Floats:
        self._goal = tasks["goal"].astype(np.float64)[:, None]
        self._at = np.zeros((len(rngs), max(counts), 2))
        return self._at

    def step(self, actions: Floats, alive: NDArray[np.bool_]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        self._at = self._at + np.clip(actions, -STEP, STEP)
        away = self._at - self._goal
        return self._at, -np.linalg.norm(away, axis=-1), np.all(np.abs(away) < NEAR, axis=-1, keepdims=False).astype(bool)


@dataclass(frozen=True)
class Navigation:
    """Goals from U(−0.5, 0.5)²; policies see their position only. Horizon 100.

    Validation and test tasks are drawn as training tasks are, with the evaluation's seed.
    """

    rollouts: int = 20
    """Episodes per task and step (K)."""
    horizon: int = 100
    """Time steps of an episode (H)."""
    test_steps: int = 4000
    """Time steps per task and step at validation and test."""

    def __post_init__(self) -> None:
        for name in ("rollouts", "horizon", "test_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 wanted")

    @property
    def kind(self) -> Literal["control"]:
        return "control"

    @property
    def inputs(self) -> tuple[int, ...]:
        return (2,)

    @property
    def outputs(self) -> int:
        return 2

    def prepare(self) -> None:
        pass

    def sample(self, split: str, rng: np.random.Generator) -> Arrays:
        check_split(split)
        return {"goal": rng.uniform(-0.5, 0.5, 2)}

    def rollout(self, tasks: Arrays, act: Act, rngs: list[np.random.Generator], *, testing: bool) -> Arrays:
        episodes = -(-self.test_steps // self.horizon) if testing else self.rollouts
        return collect(PointWorld(), tasks, act, rngs, episodes, self.horizon)
