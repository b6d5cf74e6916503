"""RL tasks: alternate rollout and adaptation until a task is recorded data, which is then differentiated like any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from envs.base import Arrays
from learners import policy_gradient
from learners.base import Data, Learner, Meta, Metrics, Params
from learners.models import Functional
from learners.policy_gradient import InnerLoss

Array = np.ndarray[Any, np.dtype[Any]]
Act = Callable[[Array, Array, Array], Array]


@runtime_checkable
class Rollouts(Protocol):
    """Tasks that must be lived through: `envs.rollout` has the meaning of everything."""

    def rollout(self, tasks: Arrays, act: Act, rngs: list[np.random.Generator], *, testing: bool) -> Arrays:
        """Recorded time steps [tasks, n, …] of all tasks."""


@dataclass(frozen=True)
class Control:
    """A policy that adapts by policy gradient to episodes that it has sampled itself.

    A task's data are time steps [steps + 1, n, …]: index k holds what φ_k has sampled. Inner step k descends the inner
    loss on index k;  `query` is the surrogate  −mean π_φ(a|s)/π_old(a|s) · A  on the last index, sampled by the adapted
    policy, never by θ.
    """

    policy: Functional
    rollouts: Rollouts
    inner_loss: InnerLoss = "log_likelihood"
    discount: float = 0.99
    gae: float = 1.0
    device: str = "cpu"

    def support(self, params: Params, data: Data, step: int) -> Tensor:
        part = {k: v[step] for k, v in data.items() if k in RECORDED}
        log_p = policy_gradient.log_prob(self.policy(params, part["observations"]), part["actions"])
        return policy_gradient.inner_loss(self.inner_loss, log_p, part["old_log_p"], part)

    def query(self, params: Params, data: Data) -> Tensor:
        part = {k: v[-1] for k, v in data.items() if k in RECORDED}
        log_p = policy_gradient.log_prob(self.policy(params, part["observations"]), part["actions"])
        return -policy_gradient.masked_mean(torch.exp(log_p - part["old_log_p"]) * part["advantages"], part["mask"])

    def distribution(self, params: Params, data: Data) -> Tensor:
        """Means and log standard deviations [n, 2a] on what the adapted policy has seen."""
        return self.policy(params, data["observations"][-1])

    def measure(self, params: Params, data: Data) -> Metrics:
        return {"surrogate": self.query(params, data)}

    def curve(self, data: Data) -> Metrics:
        """Mean return of φ₀ … φ_steps' episodes [steps + 1], of one task."""
        return {"return": data["return"]}

    def slots(self) -> Params:
        return {}

    def track(self, params: Params, data: Data) -> Params:
        return {}

    def to(self, device: str) -> Control:
        return replace(self, policy=self.policy.to(device), device=device)

    def summary(self) -> str:
        return f"policy gradient ({self.inner_loss}, discount {self.discount:g}, GAE {self.gae:g})"

    def record(self, learner: Learner, meta: Meta, tasks: Data, steps: int, *, testing: bool = False) -> Data:
        """Live through the tasks of a shard: sample with φ_k, adapt on that, and so on; data of every task, stacked.

        Each task's own φ_k, its own generator. A learner's `path` is lazy: φ_{k+1} is computed from index k after it is filled.
        """
        arrays = {k: v.cpu().numpy() for k, v in tasks.items()}
        rngs = [np.random.Generator(np.random.Philox(key=int(seed))) for seed in arrays.pop("seed")]
        lived: list[Data] = [{} for _ in rngs]
        paths = [learner.path(meta, self, data, steps) for data in lived]
        for k in range(steps + 1):
            with torch.no_grad():
                phis = [next(path) for path in paths]
            sampled = self.rollouts.rollout(arrays, self._actor(phis), rngs, testing=testing)
            for i, data in enumerate(lived):
                self._append(data, k, steps, phis[i], {name: v[i] for name, v in sampled.items()})
        return {k: torch.stack([d[k] for d in lived]) for k in lived[0]}

    def _actor(self, phis: list[Params]) -> Act:
        stacked = {k: torch.stack([phi[k] for phi in phis]) for k in phis[0]}
        batched = torch.func.vmap(lambda p, x: self.policy(p, x))
        whole = np.arange(len(phis))

        def act(which: Array, observations: Array, noise: Array) -> Array:
            weights = stacked if len(which) == len(whole) else {k: v[torch.from_numpy(which)] for k, v in stacked.items()}
            like = next(iter(weights.values()))
            x = torch.from_numpy(np.ascontiguousarray(observations)).to(like)
            with torch.no_grad():
                mean, log_std = batched(weights, x).chunk(2, -1)
                actions = mean + torch.exp(log_std) * torch.from_numpy(np.ascontiguousarray(noise)).to(like)
            result: Array = actions.cpu().numpy()
            return result

        return act

    def _append(self, data: Data, k: int, steps: int, phi: Params, sampled: Arrays) -> None:
        """Fill index k of one task's data."""
        processed = self._processed(sampled)
        like = next(iter(phi.values()))
        new = {name: torch.from_numpy(v).to(like.device, like.dtype if v.dtype.kind == "f" else None) for name, v in processed.items()}
        with torch.no_grad():
            new["old"] = self.policy(phi, new["observations"])
            new["old_log_p"] = policy_gradient.log_prob(new["old"], new["actions"])
        for name, value in new.items():
            if name not in data:
                data[name] = value.new_zeros((steps + 1, *value.shape))
            data[name][k] = value

    def _processed(self, sampled: Arrays) -> Arrays:
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
            "advantages": advantages, "first": first, "return": arrays["return"],
        }  # fmt: skip


RECORDED = ("observations", "actions", "mask", "advantages", "first", "old", "old_log_p")
"""What is indexed by inner step."""
