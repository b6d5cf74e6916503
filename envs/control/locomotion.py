"""Locomotion: one stepper for every body and goal of `envs.control.bodies`, and the tasks made of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from envs.base import Arrays, Clip, Predict, check_split
from envs.control.bodies import BODIES, GOALS, BodyName, GoalName, published
from envs.control.rendering import frames
from envs.control.rollout import Act, Floats, Told, check_sizes, collect
from envs.control.world import LocomotionWorld, observation_size

FRAME_SECONDS = 0.06  # between the frames of a film, at least a time step


@cache
def world(body: BodyName, goal: GoalName, backend: str) -> LocomotionWorld:
    """One per process: its copies are made once."""
    from envs.control.planar import PlanarWorld

    return (PlanarWorld if backend == "rollout" else LocomotionWorld)(BODIES[body], GOALS[goal])


@dataclass(frozen=True)
class Locomotion:
    """A robot, and what it is to do: run forward or backward, at a velocity, to a place, or with another body each
    time.
    """

    body: BodyName = "half_cheetah_paper"
    """Robot and physics: …_v5 is Gymnasium's, …_paper the MAML paper's."""
    goal: GoalName = "direction"
    """direction: ±x;  velocity: along x, from U(0, fastest);  position: a place in 6 × 6 m;  direction_2d: any;
    parameters: forward, with masses, inertias, friction and damping drawn anew."""
    backend: Literal["exact", "rollout"] = "exact"
    """exact: an MjData per copy, equal to Gymnasium;  rollout: mujoco.rollout, faster, equal to solver tolerance
    (half_cheetah)."""
    rollouts: int = 20
    """Episodes per task and step (K)."""
    horizon: int = 200
    """Time steps of an episode (H)."""
    test_steps: int = 4000
    """Time steps per task and step at validation and test."""
    test_tasks: Literal["drawn", "paper"] = "drawn"
    """Test tasks: drawn with the evaluation's seed, or the paper's 40 (direction and velocity)."""
    known: bool = False
    """Append the goal to the observations: no adaptation is needed then (the paper's oracle)."""

    def __post_init__(self) -> None:
        check_sizes(rollouts=self.rollouts, horizon=self.horizon, test_steps=self.test_steps)
        if self.goal not in BODIES[self.body].goals:
            raise ValueError(f"goal={self.goal!r}: {self.body} has {', '.join(BODIES[self.body].goals)}")
        if self.backend == "rollout" and not self.body.startswith("half_cheetah"):
            raise ValueError(f"backend='rollout' is for half_cheetah bodies; {self.body} wants 'exact'")
        if self.test_tasks == "paper":
            published(self.body, self.goal, 0)
        if self.known and self.goal == "parameters":
            raise ValueError("known=true: goal='parameters' has no goal to append")

    @property
    def kind(self) -> Literal["control"]:
        return "control"

    @property
    def inputs(self) -> tuple[int, ...]:
        return (observation_size(BODIES[self.body], GOALS[self.goal]) + (self._told() if self.known else 0),)

    @property
    def outputs(self) -> int:
        return BODIES[self.body].actions

    @property
    def groups(self) -> tuple[str, ...]:
        """Kinds of tasks whose returns are reported apart."""
        return ("backward", "forward") if self.goal == "direction" else ()

    def group(self, task: Arrays) -> int:
        """Index into `groups`."""
        return int(float(task["goal"]) > 0)

    def prepare(self) -> None:
        """Raise ValueError where MuJoCo is missing."""
        try:
            import gymnasium  # noqa: F401
            import mujoco  # noqa: F401
        except ImportError as error:
            raise ValueError(f"locomotion wants {error.name}: pip install gymnasium mujoco") from error

    def sample(self, split: str, rng: np.random.Generator) -> Arrays:
        check_split(split)
        return GOALS[self.goal].draw(rng, BODIES[self.body])

    def fixed(self, split: str, index: int) -> Arrays | None:
        return published(self.body, self.goal, index) if split == "test" and self.test_tasks == "paper" else None

    def rollout(self, tasks: Arrays, act: Act, rngs: list[np.random.Generator], *, testing: bool) -> Arrays:
        episodes = -(-self.test_steps // self.horizon) if testing else self.rollouts
        here = world(self.body, self.goal, self.backend)
        return collect(Told(here, self._told()) if self.known else here, tasks, act, rngs, episodes, self.horizon)

    def title(self, task: Arrays) -> str:
        """What the task is, in a few words."""
        if self.goal == "parameters":
            return "another body"
        if self.goal == "direction":
            return self.groups[self.group(task)]
        numbers = ", ".join(f"{v:.2f}" for v in np.atleast_1d(task["goal"]))
        return f"{self.goal} {numbers}"

    def film(self, tasks: list[Arrays], predict: list[Predict], steps: list[int]) -> list[list[Clip]]:
        """One episode without noise per task and number of steps, its first position the same."""
        plain = LocomotionWorld(BODIES[self.body], GOALS[self.goal])
        here = Told(plain, self._told()) if self.known else plain
        body, alive = BODIES[self.body], np.ones((1, 1), bool)
        positions: list[Floats] = []
        every = max(1, round(FRAME_SECONDS / (body.timestep * body.frame_skip)))
        for task, say in zip(tasks, predict, strict=True):
            for i in range(len(steps)):
                observation = here.reset(
                    {k: np.asarray(v)[None] for k, v in task.items()}, [1], [np.random.default_rng(0)]
                )
                ended = False
                for t in range(self.horizon):
                    if t % every == 0:  # whoever has fallen stays there
                        positions.append(positions[-1] if ended else plain.frame())
                    if not ended:
                        action = np.asarray(say(observation[0].astype(np.float32))[i], np.float32)
                        observation, _, over = here.step(action[None], alive)
                        ended = bool(over[0, 0])
        ant = body.asset == "ant.xml"
        rendered = frames(plain.model, np.stack(positions), 4.0 if ant else 2.4)
        captions = [f"{q[0]:.1f}, {q[1]:.1f} m" if ant else f"{q[0]:+.1f} m" for q in positions]
        length = len(positions) // (len(tasks) * len(steps))
        seconds = every * body.timestep * body.frame_skip
        clips = [
            Clip(rendered[i : i + length], captions[i : i + length], seconds) for i in range(0, len(positions), length)
        ]
        return [clips[i : i + len(steps)] for i in range(0, len(clips), len(steps))]

    def _told(self) -> int:
        """Length of a goal."""
        return 2 if self.goal in ("position", "direction_2d") else 1
