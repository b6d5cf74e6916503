"""Locomotion: bodies and goals in two tables, one stepper; Gymnasium's v5 physics, and the MAML paper's.

The two physics are different worlds whose returns cannot be compared, hence the names: `…_v5` is Gymnasium's (frame skip
5), `…_paper` is rllab's (frame skip 1, a shorter time step, velocity of the whole body's centre of mass, other costs).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from envs.base import Arrays, check_split
from envs.rollout import Act, Floats, collect

log = logging.getLogger("metafleet")

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


@cache
def load(body: Body) -> Any:
    """The body's MuJoCo model: Gymnasium's file, changed in code for the paper's physics. One per process; nobody changes it."""
    import gymnasium
    import mujoco

    # Without a handler MuJoCo writes its warnings into a file in the current folder.
    mujoco.set_mju_user_warning(_warn)
    path = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / body.asset
    model = mujoco.MjModel.from_xml_path(str(path))
    model.opt.timestep = body.timestep
    if body.paper and body.asset == "ant.xml":
        model.geom_solref[:] = (0.02, 1.0)
        model.geom_solimp[:, :3] = (0.8, 0.8, 0.01)
    return model


def _warn(message: str) -> None:
    if "settotalmass" not in message:  # of Gymnasium's model file; nothing to be done about it here
        log.warning("MuJoCo: %s", message)


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

    def reset(self, tasks: Arrays, counts: list[int], rngs: list[np.random.Generator]) -> Floats:
        self._goals = np.asarray(tasks["goal"], np.float64)[:, None]
        self._shape = (len(rngs), max(counts))
        still = self._start, np.zeros(self.model.nv)
        self._begin([self._drawn(rng) if k < n else still for rng, n in zip(rngs, counts, strict=True) for k in range(max(counts))])
        return self._observe()

    def step(self, actions: Floats, alive: NDArray[np.bool_]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        body, before = self.body, self._x
        flat = actions.reshape(-1, self.actions)
        # Torque limits ±1: MuJoCo clips what drives the body, rllab clips what is paid for as well.
        paid = np.clip(flat, -1, 1) if body.paper else flat
        self._advance(flat, alive.reshape(-1))
        velocity = self._velocity if body.paper else (self._x - before) / (body.timestep * body.frame_skip)
        cost = body.control_cost * np.square(paid.astype(np.float64)).sum(-1)
        if body.contact_cost:
            cost = cost + body.contact_cost * np.square(self._contacts).sum(-1)
        reward = GOALS[self.goal](self._goals, velocity.reshape(self._shape), body) + body.alive - cost.reshape(self._shape)
        return self._observe(), reward, self._fallen().reshape(self._shape)

    def _begin(self, states: list[tuple[Floats, Floats]]) -> None:
        while len(self._data) < len(states):
            self._data.append(self._mj.MjData(self.model))
        self._live = self._data[: len(states)]
        self._views = [(d.qpos, d.qvel, d.ctrl, d.qacc_warmstart) for d in self._live]
        for data, (qpos, qvel) in zip(self._live, states, strict=True):
            self._mj.mj_resetData(self.model, data)
            data.qpos[:], data.qvel[:] = qpos, qvel
            self._mj.mj_forward(self.model, data)
            if self.body.contact_cost and self.body.paper:
                self._mj.mj_rnePostConstraint(self.model, data)
        self._read()

    def _advance(self, actions: Floats, alive: NDArray[np.bool_]) -> None:
        for (_, _, ctrl, warm), data, action, moves in zip(self._views, self._live, actions, alive, strict=True):
            if not moves:
                continue
            ctrl[:] = action
            if self.body.paper:
                # Where it starts from is part of a solver's result, and nobody can say where another backend starts.
                warm[:] = 0
            self._mj.mj_step(self.model, data, self.body.frame_skip)
            self._settle(data)
        self._read()

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


class PlanarWorld(LocomotionWorld):
    """The same for a body in the x–z plane without contact costs, by `mujoco.rollout`: one call for all copies.

    It returns positions and velocities only, and its sensors belong to the state before the step. The centre of mass
    is therefore computed here: each body turns by the sum of the hinges above it, so that the centre is
    root + c + Σ_k (a_k cos ω_k + b_k sin ω_k) with constants that a least-squares fit finds exactly.
    """

    def __init__(self, body: Body, goal: GoalName) -> None:
        super().__init__(body, goal)
        from mujoco.rollout import Rollout

        self._rollout = Rollout(nthread=0)
        self._one = self._mj.MjData(self.model)
        self._full = self._mj.mjtState.mjSTATE_FULLPHYSICS
        self._turns = self._chains()
        self._centre = self._fitted() if body.paper else None

    def _begin(self, states: list[tuple[Floats, Floats]]) -> None:
        self._state = np.zeros((len(states), self._mj.mj_stateSize(self.model, self._full)))
        nq = self.model.nq
        for row, (qpos, qvel) in zip(self._state, states, strict=True):
            row[1 : 1 + nq], row[1 + nq :] = qpos, qvel
        self._next = np.zeros((len(states), 1, self._state.shape[1]))
        self._live = [self._one] * len(states)
        self._parse()

    def _advance(self, actions: Floats, alive: NDArray[np.bool_]) -> None:
        control = np.repeat(actions.astype(np.float64)[:, None], self.body.frame_skip, 1)
        states, _ = self._rollout.rollout(self.model, self._one, self._state, control)
        self._state = states[:, -1]
        self._parse()

    def _parse(self) -> None:
        nq = self.model.nq
        self._qpos, self._qvel = self._state[:, 1 : 1 + nq], self._state[:, 1 + nq :]
        self._x = self._qpos[:, 0]
        if self._centre is not None:
            angles, speeds = self._qpos @ self._turns, self._qvel @ self._turns
            turned = np.concatenate([np.ones((len(angles), 1)), np.cos(angles), np.sin(angles)], 1)
            moving = np.concatenate([np.zeros((len(angles), 1)), -np.sin(angles) * speeds, np.cos(angles) * speeds], 1)
            xz = self._qpos[:, :2] + turned @ self._centre
            self._com = np.stack([xz[:, 0], np.zeros(len(xz)), xz[:, 1]], 1)
            self._velocity = self._qvel[:, 0] + (moving @ self._centre)[:, 0]

    def _chains(self) -> Floats:
        """[nq, bodies]: by which hinges a body is turned about y, and in which sense."""
        model, turns = self.model, np.zeros((self.model.nq, self.model.nbody - 1))
        for body in range(1, model.nbody):
            above = body
            while above:
                first = model.body_jntadr[above]
                for joint in range(first, first + model.body_jntnum[above]):
                    if model.jnt_type[joint] == self._mj.mjtJoint.mjJNT_HINGE:
                        turns[model.jnt_qposadr[joint], body - 1] = model.jnt_axis[joint][1]
                above = model.body_parentid[above]
        return turns

    def _fitted(self) -> Floats:
        """Constants [1 + 2 · bodies, 2] of the centre of mass, from MuJoCo's own at random postures."""
        rng, rows, targets = np.random.default_rng(0), [], []
        for _ in range(100):
            qpos = rng.uniform(-1, 1, self.model.nq)
            self._one.qpos[:] = qpos
            self._mj.mj_kinematics(self.model, self._one)
            self._mj.mj_comPos(self.model, self._one)
            angles = qpos @ self._turns
            rows.append(np.concatenate([[1], np.cos(angles), np.sin(angles)]))
            targets.append(self._one.subtree_com[1][[0, 2]] - qpos[:2])
        constants: Floats = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
        return constants


@dataclass(frozen=True)
class Locomotion:
    """A robot, and what it is to do: run forward or backward, or at a velocity from U(0, fastest)."""

    body: BodyName = "half_cheetah_paper"
    """Robot and physics: …_v5 is Gymnasium's, …_paper the MAML paper's."""
    goal: GoalName = "direction"
    """direction: −1 or 1 times the velocity;  velocity: minus the distance from the goal's."""
    backend: Literal["exact", "rollout"] = "exact"
    """exact: an MjData per copy, equal to Gymnasium;  rollout: mujoco.rollout, faster, equal to solver tolerance (half_cheetah)."""
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
        if self.backend == "rollout" and BODIES[self.body].contact_cost:
            raise ValueError(f"backend='rollout' gives no contact forces, which {self.body} is about; 'exact' does")

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
        world = PlanarWorld if self.backend == "rollout" else LocomotionWorld
        return collect(world(BODIES[self.body], self.goal), tasks, act, rngs, episodes, self.horizon)
