"""RL tasks become data: rollout and adaptation alternate until a task is recorded, and differentiated like any
other.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from envs.base import Arrays
from learners.base import GROUP, SEED, Data, Learner, Meta, Objective, Params
from learners.engine import tree
from learners.engine.derivative import differentiate
from learners.inner import partition
from learners.modules.functional import Functional
from learners.objectives import policy_gradient
from learners.objectives.acting import Act, Actors, Array


@runtime_checkable
class Rollouts(Protocol):
    """Tasks that must be lived through: `envs.control.rollout` has the meaning of everything."""

    def rollout(self, tasks: Arrays, act: Act, rngs: list[np.random.Generator], *, testing: bool) -> Arrays:
        """Recorded time steps [tasks, n, …] of all tasks."""


@dataclass(frozen=True)
class Recorder:
    """Lives through the tasks of a shard; `discount` and `gae` are what advantages are estimated with."""

    policy: Functional
    rollouts: Rollouts
    discount: float
    gae: float
    _actors: Actors = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_actors", Actors(self.policy))

    def lived(
        self, objective: Objective, learner: Learner, meta: Meta, tasks: Data, steps: int, *, testing: bool
    ) -> Data:
        """Live through the tasks of a shard: sample with φ_k, adapt on that, and so on; data of every task, stacked.

        Each task's own φ_k, its own generator. A learner's `path` is lazy: φ_{k+1} is computed from index k after it is
        filled.
        """
        arrays = {k: v.cpu().numpy() for k, v in tasks.items()}
        rngs = [np.random.Generator(np.random.Philox(key=int(seed))) for seed in arrays.pop(SEED)]
        lived: list[Data] = [{} for _ in rngs]
        paths = [learner.path(meta, objective, data, steps) for data in lived]
        thetas: list[Params] = []
        for k in range(steps + 1):
            began = time.perf_counter()
            with torch.no_grad():
                phis = [next(path) for path in paths]
            adapted = time.perf_counter() - began
            thetas = thetas or phis
            sampled = self.rollouts.rollout(arrays, self._actors.of(phis), rngs, testing=testing)
            began = time.perf_counter()
            for i, data in enumerate(lived):
                self._append(data, k, steps, phis[i], {name: v[i] for name, v in sampled.items()})
                if not testing:
                    self._watch(objective, learner, data, k, steps, thetas[i], phis[i])
            adapted += time.perf_counter() - began
            for data in lived if not testing else ():
                data["adaptation_s"][k] = adapted / len(lived)
        return {k: torch.stack([d[k] for d in lived]) for k in lived[0]} | {
            k: v for k, v in tasks.items() if k == GROUP
        }

    def _watch(
        self, objective: Objective, learner: Learner, data: Data, k: int, steps: int, theta: Params, phi: Params
    ) -> None:
        """What tells whether adaptation does anything: the size of its gradient, and how far φ_k's actions are from
        θ's.
        """
        if not k:
            data |= {
                name: data["return"].new_zeros(steps + 1)
                for name in ("inner_grad_norm", "adaptation_kl", "adaptation_s")
            }
        if k < steps:
            moving, still = partition(phi, getattr(learner, "adapts", ("*",)))
            data["inner_grad_norm"][k] = tree.norm(
                differentiate(lambda p: objective.support(still | p, data, k), moving)[0]
            )
        with torch.no_grad():
            apart = policy_gradient.kl(self.policy(theta, data["observations"][k]), data["old"][k])
            data["adaptation_kl"][k] = policy_gradient.masked_mean(apart, data["mask"][k])

    def _append(self, data: Data, k: int, steps: int, phi: Params, sampled: Arrays) -> None:
        """Fill index k of one task's data."""
        credited = self._credited(sampled)
        like = next(iter(phi.values()))
        new = {
            name: torch.from_numpy(v).to(like.device, like.dtype if v.dtype.kind == "f" else None, copy=True)
            for name, v in credited.items()
        }
        with torch.no_grad():
            new["old"] = self.policy(phi, new["observations"])
            new["old_log_p"] = policy_gradient.log_prob(new["old"], new["actions"])
        for name, value in new.items():
            if name not in data:
                data[name] = value.new_zeros((steps + 1, *value.shape))
            data[name][k] = value

    def _credited(self, sampled: Arrays) -> Arrays:
        """With advantages, from a baseline fitted to this task and step alone."""
        arrays: dict[str, Array] = {k: np.asarray(v) for k, v in sampled.items()}
        n = int(arrays["mask"].sum())
        time, rewards = arrays["time"][:n], arrays["rewards"][:n]
        starts = time == 0
        returns = policy_gradient.discounted(rewards, starts, self.discount)
        values = policy_gradient.baseline(arrays["observations"][:n], time, returns)
        advantages = np.zeros(len(arrays["mask"]))
        advantages[:n] = policy_gradient.advantages(rewards, values, starts, self.discount, self.gae)
        first = np.arange(len(advantages))
        first[:n] -= time
        return {
            "observations": arrays["observations"], "actions": arrays["actions"], "mask": arrays["mask"],
            "rewards": arrays["rewards"], "advantages": advantages, "first": first, "return": arrays["return"],
            "physics_s": arrays["physics_s"], "policy_s": arrays["policy_s"],
        }  # fmt: skip
