"""Locomotion: bodies and goals in two tables, one stepper; Gymnasium's v5 physics, and the MAML paper's.

The two physics are different worlds whose returns cannot be compared, hence the names: `…_v5` is Gymnasium's (frame skip
5), `…_paper` is rllab's (frame skip 1, a shorter time step, velocity of the whole body's centre of mass, other costs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from envs.base import Arrays, check_split
from envs.rollout import Act, Floats, collect

BodyName = Literal["half_cheetah_v5", "half_cheetah_paper", "ant_v5", "ant_paper"]
GoalName = Literal["direction", "velocity"]


@dataclass(frozen=True)
class Body:
    """A robot in one of the two physics."""

    asset: str
    """Gymnasium's model file."""
    observations: int
    actions: int
    frame_skip: int
    timestep: float
    hidden: int
    """Leading coordinates that a policy does not see."""
    paper: bool
    """rllab's physics: Gaussian reset, centre-of-mass velocity, observation and velocity of the new state."""
    fastest: float
    """Upper end of goal velocities."""
    control_cost: float
    contact_cost: float = 0.0
    alive: float = 0.0
    """Reward of each time step."""
    bonus: float = 0.0
    """Further reward of each time step where the goal is a velocity."""
    heights: tuple[float, float] | None = None
    """Range of the torso's height outside of which an episode ends."""


BODIES: dict[BodyName, Body] = {
    "half_cheetah_v5": Body("half_cheetah.xml", 17, 6, 5, 0.01, 1, False, 2.0, 0.05),
    "half_cheetah_paper": Body("half_cheetah.xml", 20, 6, 1, 0.01, 1, True, 2.0, 0.05),
    "ant_v5": Body("ant.xml", 105, 8, 5, 0.01, 2, False, 3.0, 0.005, 5e-4, 0.05, 1.0, (0.2, 1.0)),
    "ant_paper": Body("ant.xml", 125, 8, 1, 0.02, 0, True, 3.0, 0.005, 5e-4, 0.05, 1.0, (0.2, 1.0)),
}

# (goal, velocity along x, body) → reward, before costs.
GOALS: dict[GoalName, Callable[[Floats, Floats, Body], Floats]] = {
    "direction": lambda goal, velocity, body: goal * velocity,
    "velocity": lambda goal, velocity, body: body.bonus - np.abs(velocity - goal),
}


def load(body: Body) -> Any:
    """The body's MuJoCo model: Gymnasium's file, changed in code for the paper's physics."""
    import gymnasium
    import mujoco

    path = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / body.asset
    model = mujoco.MjModel.from_xml_path(str(path))
    model.opt.timestep = body.timestep
    if body.paper and body.asset == "ant.xml":
        model.geom_solref[:] = (0.02, 1.0)
        model.geom_solimp[:, :3] = (0.8, 0.8, 0.01)
    return model


class LocomotionWorld:
    """Many copies of a body, each with an MjData of its own: exact, to the last bit, where Gymnasium's physics is meant."""

    def __init__(self, body: Body, goal: GoalName) -> None:
        import mujoco

        self._mj: Any = mujoco
        self.body, self.goal = body, goal
        self.observations, self.actions, self.ends = body.observations, body.actions, body.heights is not None
        self.model = load(body)
        self._data: list[Any] = []
        self._start = self.model.numeric_data[:15].copy() if body.paper and body.asset == "ant.xml" else self.model.qpos0.copy()

    def reset(self, tasks: Arrays, rollouts: int, rngs: list[np.random.Generator]) -> Floats:
        self._goals = np.asarray(tasks["goal"], np.float64)[:, None]
        self._shape = (len(rngs), rollouts)
        count = len(rngs) * rollouts
        while len(self._data) < count:
            self._data.append(self._mj.MjData(self.model))
        self._live = self._data[:count]
        self._views = [(d.qpos, d.qvel, d.ctrl, d.qacc_warmstart) for d in self._live]
        for i, data in enumerate(self._live):
            self._mj.mj_resetData(self.model, data)
            data.qpos[:], data.qvel[:] = self._drawn(rngs[i // rollouts])
            self._mj.mj_forward(self.model, data)
            if self.body.contact_cost and self.body.paper:
                self._mj.mj_rnePostConstraint(self.model, data)
        self._read()
        return self._observe()

    def step(self, actions: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        body, before = self.body, self._x
        flat = actions.reshape(-1, self.actions)
        # Torque limits ±1: MuJoCo clips what drives the body, rllab clips what is paid for as well.
        paid = np.clip(flat, -1, 1) if body.paper else flat
        for (_, _, ctrl, warm), data, action in zip(self._views, self._live, flat, strict=True):
            ctrl[:] = action
            if body.paper:
                warm[:] = 0
            self._mj.mj_step(self.model, data, body.frame_skip)
            self._settle(data)
        self._read()
        velocity = self._velocity if body.paper else (self._x - before) / (body.timestep * body.frame_skip)
        cost = body.control_cost * np.square(paid.astype(np.float64)).sum(-1)
        if body.contact_cost:
            cost = cost + body.contact_cost * np.square(self._contacts).sum(-1)
        reward = GOALS[self.goal](self._goals, velocity.reshape(self._shape), body) + body.alive - cost.reshape(self._shape)
        return self._observe(), reward, self._fallen().reshape(self._shape)

    def _drawn(self, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """First position and velocity, in Gymnasium's order of draws."""
        nq, nv = self.model.nq, self.model.nv
        if self.body.paper:
            return self._start + 0.01 * rng.standard_normal(nq), 0.1 * rng.standard_normal(nv)
        return self._start + rng.uniform(-0.1, 0.1, nq), 0.1 * rng.standard_normal(nv)

    def _settle(self, data: Any) -> None:
        """Bring what the step left behind to where it is read."""
        mj, model = self._mj, self.model
        if self.body.paper and self.body.contact_cost:
            mj.mj_forward(model, data)
            mj.mj_rnePostConstraint(model, data)
            mj.mj_subtreeVel(model, data)
        elif self.body.paper:
            mj.mj_kinematics(model, data)
            mj.mj_comPos(model, data)
            mj.mj_comVel(model, data)
            mj.mj_subtreeVel(model, data)
        elif self.body.contact_cost:
            mj.mj_rnePostConstraint(model, data)

    def _read(self) -> None:
        live, body = self._live, self.body
        self._qpos = np.stack([v[0] for v in self._views])
        self._qvel = np.stack([v[1] for v in self._views])
        if body.paper:
            self._com = np.stack([d.subtree_com[1] for d in live])
            self._velocity = np.stack([d.subtree_linvel[1, 0] for d in live])
        if body.contact_cost:
            self._contacts = np.clip(np.stack([d.cfrc_ext for d in live]), -1, 1).reshape(len(live), -1)
        # Gymnasium's ant takes its velocity from the torso's place, which lags one sub-step; its cheetah from the joint.
        self._x = np.array([d.xpos[1, 0] for d in live]) if body.asset == "ant.xml" else self._qpos[:, 0]

    def _observe(self) -> Floats:
        body = self.body
        parts = [self._qpos[:, body.hidden :], self._qvel]
        if body.contact_cost:
            parts.append(self._contacts if body.paper else self._contacts[:, 6:])
        if body.paper and body.contact_cost:
            parts.append(np.stack([d.xmat[1] for d in self._live]))
        if body.paper:
            parts.append(self._com)
        return np.concatenate(parts, 1).reshape(*self._shape, -1)

    def _fallen(self) -> NDArray[np.bool_]:
        if self.body.heights is None:
            return np.zeros(len(self._live), bool)
        finite = np.isfinite(self._qpos).all(1) & np.isfinite(self._qvel).all(1)
        low, high = self.body.heights
        standing: NDArray[np.bool_] = finite & (self._qpos[:, 2] >= low) & (self._qpos[:, 2] <= high)
        return ~standing


@dataclass(frozen=True)
class Locomotion:
    """A robot, and what it is to do: run forward or backward, or at a velocity from U(0, fastest)."""

    body: BodyName = "half_cheetah_paper"
    """Robot and physics: …_v5 is Gymnasium's, …_paper the MAML paper's."""
    goal: GoalName = "direction"
    """direction: −1 or 1 times the velocity;  velocity: minus the distance from the goal's."""
    rollouts: int = 20
    """Episodes per task and step (K)."""
    horizon: int = 200
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
        return (BODIES[self.body].observations,)

    @property
    def outputs(self) -> int:
        return BODIES[self.body].actions

    def prepare(self) -> None:
        """Raise ValueError where MuJoCo is missing."""
        try:
            import gymnasium  # noqa: F401
            import mujoco  # noqa: F401
        except ImportError as error:
            raise ValueError(f"locomotion wants {error.name}: pip install gymnasium mujoco") from error

    def sample(self, split: str, rng: np.random.Generator) -> Arrays:
        check_split(split)
        if self.goal == "direction":
            return {"goal": np.asarray(rng.choice([-1.0, 1.0]))}
        return {"goal": np.asarray(rng.uniform(0, BODIES[self.body].fastest))}

    def rollout(self, tasks: Arrays, act: Act, rngs: list[np.random.Generator], *, testing: bool) -> Arrays:
        episodes = -(-self.test_steps // self.horizon) if testing else self.rollouts
        return collect(LocomotionWorld(BODIES[self.body], self.goal), tasks, act, rngs, episodes, self.horizon)
