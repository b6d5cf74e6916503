"""Any Gymnasium environment with something to set as a family of tasks: the slower, generic way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from envs.base import Arrays
from envs.control.rollout import Act, Floats, check_sizes, collect


class GymnasiumWorld:
    """Copies of an environment, stepped one after the other; an episode ends where the environment terminates or
    truncates.
    """

    ends = True

    def __init__(self, make: Callable[[], Any], set_task: Callable[[Any, dict[str, Any]], None]) -> None:
        self._make, self._set_task = make, set_task
        self._copies: list[Any] = [make()]
        self.observations, self.actions = (
            int(np.prod(s.shape or 1)) for s in (self.first().observation_space, self.first().action_space)
        )

    def first(self) -> Any:
        """One of the copies."""
        return self._copies[0]

    def reset(self, tasks: Arrays, counts: list[int], rngs: list[np.random.Generator]) -> Floats:
        self._shape = (len(rngs), max(counts))
        while len(self._copies) < len(rngs) * max(counts):
            self._copies.append(self._make())
        self._live = self._copies[: len(rngs) * max(counts)]
        self._seen = np.zeros((len(self._live), self.observations))
        for i, copy in enumerate(self._live):
            t, k = divmod(i, max(counts))
            if k < counts[t]:
                self._set_task(copy, {name: v[t] for name, v in tasks.items()})
                self._seen[i] = np.asarray(copy.reset(seed=int(rngs[t].integers(2**31)))[0], np.float64).reshape(-1)
        return self._seen.reshape(*self._shape, -1).copy()

    def step(self, actions: Floats, alive: NDArray[np.bool_]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        rewards, over, moving = np.zeros(len(self._live)), np.zeros(len(self._live), bool), alive.reshape(-1)
        for i, (copy, action) in enumerate(zip(self._live, actions.reshape(-1, self.actions), strict=True)):
            if not moving[i]:
                continue
            space = copy.action_space
            action = np.clip(action.reshape(space.shape), space.low, space.high).astype(space.dtype)
            observation, reward, terminated, truncated, _ = copy.step(action)
            self._seen[i] = np.asarray(observation, np.float64).reshape(-1)
            rewards[i], over[i] = reward, terminated or truncated
        return self._seen.reshape(*self._shape, -1).copy(), rewards.reshape(self._shape), over.reshape(self._shape)


@dataclass(frozen=True)
class GymnasiumTasks(ABC):
    """Derive, say how a task is drawn (`sample`) and how an environment is set to it (`set_task`); observations and
    actions are boxes.
    """

    id: str
    """The environment's id, as for `gymnasium.make`."""
    rollouts: int = 20
    """Episodes per task and step (K)."""
    horizon: int = 200
    """Time steps of an episode (H)."""
    test_steps: int = 4000
    """Time steps per task and step at validation and test."""

    def __post_init__(self) -> None:
        check_sizes(rollouts=self.rollouts, horizon=self.horizon, test_steps=self.test_steps)

    @abstractmethod
    def sample(self, split: str, rng: np.random.Generator) -> Arrays:
        """A task: numbers and arrays by name."""

    @abstractmethod
    def set_task(self, environment: Any, task: dict[str, Any]) -> None:
        """Make `environment` that of `task`, before it is reset."""

    @property
    def kind(self) -> Literal["control"]:
        return "control"

    @property
    def inputs(self) -> tuple[int, ...]:
        return (int(np.prod(self._spaces()[0].shape)),)

    @property
    def outputs(self) -> int:
        return int(np.prod(self._spaces()[1].shape))

    def prepare(self) -> None:
        """Raise ValueError where observations or actions are not boxes."""
        from gymnasium.spaces import Box

        for name, space in zip(("observations", "actions"), self._spaces(), strict=True):
            if not isinstance(space, Box):
                raise ValueError(f"{self.id} has {name} {space}: a Box wanted")

    def rollout(self, tasks: Arrays, act: Act, rngs: list[np.random.Generator], *, testing: bool) -> Arrays:
        episodes = -(-self.test_steps // self.horizon) if testing else self.rollouts
        return collect(_world(self), tasks, act, rngs, episodes, self.horizon)

    def _make(self) -> Any:
        import gymnasium

        return gymnasium.make(self.id)

    def _spaces(self) -> tuple[Any, Any]:
        one = _world(self).first()
        return one.observation_space, one.action_space


@cache
def _world(tasks: GymnasiumTasks) -> GymnasiumWorld:
    """One per process: its copies are made once."""
    return GymnasiumWorld(tasks._make, tasks.set_task)
