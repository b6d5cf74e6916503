"""A shard's robots in one process, stepped together."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.base import Arrays
from envs.control.bodies import GOALS, RANDOM, Body, Goal, changed, load
from envs.control.rollout import Floats


class LocomotionWorld:
    """Many copies of a body, each with an MjData of its own: exact, to the last bit, where Gymnasium's physics is
    meant.
    """

    def __init__(self, body: Body, goal: Goal) -> None:
        import mujoco

        self._mj: Any = mujoco
        self.body, self.goal = body, goal
        self.model = load(body)
        self._hidden = 0 if goal is GOALS["position"] else body.hidden
        self.actions, self.ends = body.actions, body.heights is not None
        self.observations = observation_size(body, goal)
        self._copies: list[Any] = []
        self._views: dict[str, list[Any]] = {}
        self._start = (
            self.model.numeric_data[:15].copy() if body.paper and body.asset == "ant.xml" else self.model.qpos0.copy()
        )

    def reset(self, tasks: Arrays, counts: list[int], rngs: list[np.random.Generator]) -> Floats:
        self._shape = (len(rngs), max(counts))
        self._goals = np.asarray(tasks.get("goal", np.zeros(len(rngs))), np.float64)[:, None]
        models = [self.model] * len(rngs)
        if "body_mass" in tasks:
            models = [changed(self.model, {k: tasks[k][t] for k in RANDOM}) for t in range(len(rngs))]
        self._models = [m for m in models for _ in range(max(counts))]
        still = self._start, np.zeros(self.model.nv)
        self._begin(
            [
                self._drawn(rng) if k < n else still
                for rng, n in zip(rngs, counts, strict=True)
                for k in range(max(counts))
            ]
        )
        return self._observe()

    def step(self, actions: Floats, alive: NDArray[np.bool_]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        body, before = self.body, self._place
        flat = actions.reshape(-1, self.actions)
        # Torque limits ±1: MuJoCo clips what drives the body, rllab clips what is paid for as well.
        paid = np.clip(flat, -1, 1) if body.paper else flat
        self._advance(flat, alive.reshape(-1))
        velocity = self._velocity if body.paper else (self._place - before) / (body.timestep * body.frame_skip)
        place = self._com[:, :2] if body.paper else self._place
        cost = body.control_cost * np.square(paid.astype(np.float64)).sum(-1)
        if body.contact_cost:
            cost = cost + body.contact_cost * np.square(self._contacts).sum(-1)
        fallen = self._fallen()
        lives = body.alive if body.paper else body.alive * ~fallen
        reward = self.goal.reward(self._goals, velocity.reshape(*self._shape, 2), place.reshape(*self._shape, 2), body)
        return self._observe(), reward + (lives - cost).reshape(self._shape), fallen.reshape(self._shape)

    def frame(self) -> Floats:
        """Positions (qpos) of the first copy, to draw."""
        first: Floats = self._qpos[0].copy()
        return first

    def _begin(self, states: list[tuple[Floats, Floats]]) -> None:
        self._make(len(states))
        for model, data, (qpos, qvel) in zip(self._models, self._copies, states, strict=False):
            self._mj.mj_resetData(model, data)
            data.qpos[:], data.qvel[:] = qpos, qvel
            self._mj.mj_forward(model, data)
            if self.body.contact_cost and self.body.paper:
                self._mj.mj_rnePostConstraint(model, data)
        self._read()

    def _make(self, count: int) -> None:
        """Copies up to `count`, and views into what is read and written of each at every step: to make one takes
        microseconds.
        """
        for _ in range(len(self._copies), count):
            data = self._mj.MjData(self.model)
            self._copies.append(data)
            views = {
                "qpos": data.qpos, "qvel": data.qvel, "ctrl": data.ctrl, "warm": data.qacc_warmstart,
                "contacts": data.cfrc_ext, "torso": data.xpos[1], "com": data.subtree_com[1],
                "velocity": data.subtree_linvel[1], "turn": data.xmat[1],
            }  # fmt: skip
            for name, view in views.items():
                self._views.setdefault(name, []).append(view)

    def _advance(self, actions: Floats, alive: NDArray[np.bool_]) -> None:
        step, skip, settle = self._mj.mj_step, self.body.frame_skip, self._settle()
        cold, views = self.body.paper, self._views
        moving = zip(alive.tolist(), self._models, self._copies, views["ctrl"], views["warm"], actions, strict=False)
        for moves, model, data, ctrl, warm, action in moving:
            if moves:
                ctrl[:] = action
                if cold:
                    # Where it starts from is part of a solver's result, and nobody can say where another backend
                    # starts.
                    warm[:] = 0
                step(model, data, skip)
                for bring in settle:
                    bring(model, data)
        self._read()

    def _drawn(self, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """First position and velocity, in Gymnasium's order of draws."""
        (place, speed), nq, nv = self.body.noise, self.model.nq, self.model.nv
        if self.body.paper:
            return self._start + place * rng.standard_normal(nq), speed * rng.standard_normal(nv)
        qpos = self._start + rng.uniform(-place, place, nq)
        return qpos, rng.uniform(-speed, speed, nv) if self.body.uniform else speed * rng.standard_normal(nv)

    def _settle(self) -> list[Any]:
        """What brings up to date that which a step leaves behind."""
        mj, body = self._mj, self.body
        if body.paper and body.contact_cost:
            return [mj.mj_forward, mj.mj_rnePostConstraint, mj.mj_subtreeVel]
        if body.paper:
            return [mj.mj_kinematics, mj.mj_comPos, mj.mj_comVel, mj.mj_subtreeVel]
        return [mj.mj_rnePostConstraint] if body.contact_cost else []

    def _all(self, name: str) -> Floats:
        """[copies, …], of the copies in use."""
        views = self._views[name][: len(self._models)]
        return np.concatenate(views).reshape(len(views), -1)

    def _read(self) -> None:
        body = self.body
        self._qpos, self._qvel = self._all("qpos"), self._all("qvel")
        if body.paper:
            self._com, self._velocity = self._all("com"), self._all("velocity")[:, :2]
        if body.contact_cost:
            self._contacts = np.clip(self._all("contacts"), -1, 1)
        # Gymnasium's ant takes its velocity from the torso's place, which lags one sub-step; the planar bodies from the
        # joint.
        if body.asset == "ant.xml":
            self._place = self._all("torso")[:, :2]
        else:
            self._place = np.stack([self._qpos[:, 0], np.zeros(len(self._qpos))], 1)

    def _observe(self) -> Floats:
        body = self.body
        parts = [self._qpos[:, self._hidden :], np.clip(self._qvel, -10, 10) if body.uniform else self._qvel]
        if body.contact_cost:
            parts.append(self._contacts if body.paper else self._contacts[:, 6:])
        if body.paper and body.contact_cost:
            parts.append(self._all("turn"))
        if body.paper:
            parts.append(self._com)
        return np.concatenate(parts, 1).reshape(*self._shape, -1)

    def _fallen(self) -> NDArray[np.bool_]:
        body = self.body
        if body.heights is None:
            return np.zeros(len(self._qpos), bool)
        low, high = body.heights
        finite = np.isfinite(self._qpos).all(1) & np.isfinite(self._qvel).all(1)
        if body.asset == "ant.xml":
            stands: NDArray[np.bool_] = finite & (self._qpos[:, 2] >= low) & (self._qpos[:, 2] <= high)
            return ~stands
        height, angle = self._qpos[:, 1], self._qpos[:, 2]
        stands = finite & (height > low) & (height < high) & (np.abs(angle) < body.upright)
        if body.asset == "hopper.xml":  # which must not fly apart either
            stands &= (np.abs(self._qpos[:, 2:]) < 100).all(1) & (np.abs(self._qvel) < 100).all(1)
        return ~stands


def observation_size(body: Body, goal: Goal) -> int:
    """Length of an observation."""
    model = load(body)
    size: int = model.nq - (0 if goal is GOALS["position"] else body.hidden) + model.nv
    if body.contact_cost:
        size += 6 * model.nbody if body.paper else 6 * (model.nbody - 1)
    return size + (3 if body.paper else 0) + (9 if body.paper and body.contact_cost else 0)
