"""The half cheetah's world by `mujoco.rollout`: one call for all copies."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from envs.control.bodies import Body, Goal
from envs.control.rollout import Floats
from envs.control.world import LocomotionWorld


class PlanarWorld(LocomotionWorld):
    """LocomotionWorld for a body in the x–z plane without contact costs, equal to it to solver tolerance.

    `mujoco.rollout` returns positions and velocities only, and its sensors belong to the state before the step. The
    centre of mass is therefore computed here: each body turns by the sum of the hinges above it, so that the centre is
    root + c + Σ_k (a_k cos ω_k + b_k sin ω_k) with constants that a least-squares fit finds exactly.
    """

    def __init__(self, body: Body, goal: Goal) -> None:
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
        self._parse()

    def _advance(self, actions: Floats, alive: NDArray[np.bool_]) -> None:
        control = np.repeat(actions.astype(np.float64)[:, None], self.body.frame_skip, 1)
        states, _ = self._rollout.rollout(self.model, self._one, self._state, control)
        self._state = states[:, -1]
        self._parse()

    def _parse(self) -> None:
        nq = self.model.nq
        self._qpos, self._qvel = self._state[:, 1 : 1 + nq], self._state[:, 1 + nq :]
        self._place = np.zeros((len(self._state), 2))
        self._place[:, 0] = self._qpos[:, 0]
        if self._centre is not None:
            angles, speeds = self._qpos @ self._turns, self._qvel @ self._turns
            turned = np.concatenate([np.ones((len(angles), 1)), np.cos(angles), np.sin(angles)], 1)
            moving = np.concatenate([np.zeros((len(angles), 1)), -np.sin(angles) * speeds, np.cos(angles) * speeds], 1)
            xz = self._qpos[:, :2] + turned @ self._centre
            self._com = np.stack([xz[:, 0], np.zeros(len(xz)), xz[:, 1]], 1)
            self._velocity = np.zeros((len(self._state), 2))
            self._velocity[:, 0] = self._qvel[:, 0] + (moving @ self._centre)[:, 0]

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
