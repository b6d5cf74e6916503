"""Our bodies and goals as Gymnasium environments: `import envs.registration;
gymnasium.make("metafleet/half_cheetah_paper-direction-v0")`.

Tasks are set by `reset(options={"task": {...}})` or `set_task`, and drawn by `sample_tasks` from a generator of their
own, apart from the one that moves the dynamics.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.control.bodies import BODIES, GOALS, BodyName, GoalName
from envs.control.locomotion import Locomotion
from envs.control.navigation import Navigation, PointWorld
from envs.control.rollout import World
from envs.control.world import LocomotionWorld

Task = dict[str, Any]
ALIVE = np.ones((1, 1), bool)


class _Tasks:
    """What single and vector environments share: a world, spaces, and tasks."""

    world: World
    family: Navigation | Locomotion

    def _open(self, body: BodyName | None, goal: GoalName | None) -> tuple[Box, Box]:
        if body is None or goal is None:
            self.world, self.family = PointWorld(), Navigation()
        else:
            self.world, self.family = LocomotionWorld(BODIES[body], GOALS[goal]), Locomotion(body, goal)
        observations = Box(-np.inf, np.inf, (self.world.observations,), np.float64)
        return observations, Box(-1, 1, (self.world.actions,), np.float32)

    def sample_tasks(self, count: int, rng: np.random.Generator) -> list[Task]:
        """`count` tasks, drawn by `rng`."""
        return [dict(self.family.sample("train", rng)) for _ in range(count)]


class TaskEnv(_Tasks, gymnasium.Env[Any, Any]):
    """One copy. Without a task it has the first that generator 0 draws."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(self, body: BodyName | None = None, goal: GoalName | None = None) -> None:
        self.observation_space, self.action_space = self._open(body, goal)
        self._task = self.sample_tasks(1, np.random.default_rng(0))[0]

    def set_task(self, task: Task) -> None:
        """The task from the next reset on."""
        self._task = task

    def get_task(self) -> Task:
        """The task that is set."""
        return self._task

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._task = (options or {}).get("task", self._task)
        observation = self.world.reset({k: np.asarray(v)[None] for k, v in self._task.items()}, [1], [self.np_random])
        return np.array(observation[0, 0], np.float64), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, ended = self.world.step(np.asarray(action)[None, None], ALIVE)
        return np.array(observation[0, 0], np.float64), float(reward[0, 0]), bool(ended[0, 0]), False, {}


class TaskVectorEnv(_Tasks, VectorEnv[Any, Any, Any]):
    """`num_envs` copies, each with a task of its own (`set_tasks`), stepped together; all are reset at once (autoreset
    disabled).
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(
        self, num_envs: int = 1, max_episode_steps: int = 0, body: BodyName | None = None, goal: GoalName | None = None
    ) -> None:
        self.num_envs, self._limit = num_envs, max_episode_steps
        self.single_observation_space, self.single_action_space = self._open(body, goal)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._tasks = self.sample_tasks(num_envs, np.random.default_rng(0))
        self._rngs: list[np.random.Generator] = []

    def set_tasks(self, tasks: list[Task]) -> None:
        """A task for each copy, from the next reset on."""
        if len(tasks) != self.num_envs:
            raise ValueError(f"{len(tasks)} tasks for {self.num_envs} environments: one for each wanted")
        self._tasks = tasks

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if "reset_mask" in (options or {}):
            raise ValueError("reset_mask: these environments are reset together")
        if "task" in (options or {}):
            self._tasks = [(options or {})["task"]] * self.num_envs
        seeds = (
            list(seed) if isinstance(seed, list) else [None if seed is None else seed + i for i in range(self.num_envs)]
        )
        if seed is not None or not self._rngs:  # else the generators go on, as a single environment's does
            self._rngs = [gymnasium.utils.seeding.np_random(s)[0] for s in seeds]
        self._elapsed = 0
        tasks = {k: np.stack([np.asarray(t[k]) for t in self._tasks]) for k in self._tasks[0]}
        return np.array(self.world.reset(tasks, [1] * self.num_envs, self._rngs)[:, 0], np.float64), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        observation, reward, ended = self.world.step(np.asarray(actions)[:, None], np.ones((self.num_envs, 1), bool))
        self._elapsed += 1
        truncated = np.full(self.num_envs, bool(self._limit) and self._elapsed >= self._limit)
        return (
            np.array(observation[:, 0], np.float64),
            np.array(reward[:, 0], np.float64),
            ended[:, 0].copy(),
            truncated,
            {},
        )


def ids() -> list[str]:
    """The registered ids."""
    return ["metafleet/navigation-v0"] + [
        f"metafleet/{name}-{goal}-v0" for name, body in BODIES.items() for goal in body.goals
    ]


def _register() -> None:
    for name in ids():
        chosen: dict[str, Any] = {}
        if name != "metafleet/navigation-v0":
            body, goal = name.removeprefix("metafleet/").removesuffix("-v0").split("-")
            chosen = {"body": body, "goal": goal}
        gymnasium.register(
            name, "envs.registration:TaskEnv", vector_entry_point="envs.registration:TaskVectorEnv",
            max_episode_steps=200 if chosen else 100, kwargs=chosen,
        )  # fmt: skip


_register()
