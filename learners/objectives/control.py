"""RL tasks: alternate rollout and adaptation until a task is recorded data, which is then differentiated like any other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from envs.base import Arrays
from learners.base import GROUP, SEED, Data, Learner, Meta, Metrics, Params
from learners.engine import tree
from learners.engine.derivative import differentiate
from learners.inner import partition
from learners.models.functional import Functional
from learners.objectives import policy_gradient
from learners.objectives.policy_gradient import InnerLoss

Array = np.ndarray[Any, np.dtype[Any]]
Act = Callable[[Array, Array, Array], Array]


@runtime_checkable
class Rollouts(Protocol):
    """Tasks that must be lived through: `envs.rollout` has the meaning of everything."""

    def rollout(self, tasks: Arrays, act: Act, rngs: list[np.random.Generator], *, testing: bool) -> Arrays:
        """Recorded time steps [tasks, n, …] of all tasks."""


EXPLORATION = "exploration"
TRACED = 4  # shapes
RUNNING = ("mean", "square", "weight")
LEAST_DEVIATION = 1e-3  # of returns, relative to their mean, that is no rounding
FOLLOW = 0.1  # of the way to this iteration's returns: how the baseline of the exploration term moves


@dataclass(frozen=True)
class Control:
    """A policy that adapts by policy gradient to episodes that it has sampled itself.

    A task's data are time steps [steps + 1, n, …]: index k holds what φ_k has sampled. Inner step k descends the inner
    loss on index k;  `query` is the surrogate  −mean π_φ(a|s)/π_old(a|s) · A  on the last index, sampled by the adapted
    policy, never by θ.

    With `exploration` = c > 0 the outer loss also holds  −c R̂ · mean log π_θ(a|s)  on index 0, R̂ being the adapted policy's
    return, standardised by a running mean and variance: what θ samples is credited with what adaptation makes of it
    (E-MAML, Stadie et al. 2018).
    """

    policy: Functional
    rollouts: Rollouts
    inner_loss: InnerLoss = "log_likelihood"
    discount: float = 0.99
    gae: float = 1.0
    exploration: float = 0.0
    device: str = "cpu"
    _graphs: dict[object, Callable[..., Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def support(self, params: Params, data: Data, step: int) -> Tensor:
        part = {k: v[step] for k, v in data.items() if k in RECORDED}
        log_p = policy_gradient.log_prob(self.policy(params, part["observations"]), part["actions"])
        return policy_gradient.inner_loss(self.inner_loss, log_p, part["old_log_p"], part)

    def query(self, params: Params, data: Data) -> Tensor:
        part = {k: v[-1] for k, v in data.items() if k in RECORDED}
        log_p = policy_gradient.log_prob(self.policy(params, part["observations"]), part["actions"])
        return -policy_gradient.masked_mean(torch.exp(log_p - part["old_log_p"]) * part["advantages"], part["mask"])

    def before(self, theta: Params, data: Data) -> Tensor:
        """The exploration term, a function of θ; 0 where there is none."""
        if not self.exploration:
            return torch.zeros((), dtype=data["mask"].dtype, device=data["mask"].device)
        seen = {k: theta[f"{EXPLORATION}/{k}"] for k in RUNNING}
        weight = seen["weight"].clamp(min=policy_gradient.EPS)
        mean = seen["mean"] / weight
        deviation = (seen["square"] / weight - mean**2).clamp(min=0).sqrt()
        # Where nothing is known yet, or all returns were equal so far, nobody is credited.
        known = (seen["weight"] > 0) & (deviation > LEAST_DEVIATION * mean.abs())
        standard = (data["return"][-1] - mean) / (deviation + policy_gradient.EPS) * known
        log_p = policy_gradient.log_prob(self.policy(theta, data["observations"][0]), data["actions"][0])
        return -self.exploration * standard * policy_gradient.masked_mean(log_p, data["mask"][0])

    def distribution(self, params: Params, data: Data, step: int = -1) -> Tensor:
        """Means and log standard deviations [n, 2a] on the time steps of index `step`, by default the adapted policy's."""
        return self.policy(params, data["observations"][step])

    def measure(self, params: Params, data: Data) -> Metrics:
        return {"surrogate": self.query(params, data)}

    def predict(self, params: Params, data: Data, x: Tensor) -> Tensor:
        """Mean actions [n, a] on observations x [n, o]."""
        return self.policy(params, x).chunk(2, -1)[0]

    def curve(self, data: Data) -> Metrics:
        """Mean return of φ₀ … φ_steps' episodes [steps + 1], of one task."""
        return {"return": data["return"]}

    def facts(self, data: Data) -> Metrics:
        """Scalars of one task to log; those under `perf/` and `count/` are to be added up over tasks."""
        returns, steps = data["return"], range(len(data["return"]) - 1)
        each = {f"inner_grad_norm_step{k}": data["inner_grad_norm"][k] for k in steps}
        moved = {f"adaptation_kl_step{k + 1}": data["adaptation_kl"][k + 1] for k in steps}
        costs = {f"perf/{name}": data[name].sum() for name in ("physics_s", "policy_s", "adaptation_s")}
        return {"adaptation_gain": returns[-1] - returns[0]} | each | moved | costs | {"count/env_steps": data["mask"].sum()}

    def slots(self) -> Params:
        return {f"{EXPLORATION}/{name}": torch.zeros(()) for name in RUNNING} if self.exploration else {}

    def track(self, params: Params, data: Data) -> Params:
        if not self.exploration:
            return {}
        last = data["return"][-1]
        seen = {"mean": last, "square": last**2, "weight": torch.ones_like(last)}
        return {f"{EXPLORATION}/{k}": (1 - FOLLOW) * params[f"{EXPLORATION}/{k}"] + FOLLOW * v for k, v in seen.items()}

    def to(self, device: str) -> Control:
        return replace(self, policy=self.policy.to(device), device=device)

    def summary(self) -> str:
        exploration = f", exploration {self.exploration:g}" if self.exploration else ""
        return f"policy gradient ({self.inner_loss}, discount {self.discount:g}, GAE {self.gae:g}{exploration})"

    def record(self, learner: Learner, meta: Meta, tasks: Data, steps: int, *, testing: bool = False) -> Data:
        """Live through the tasks of a shard: sample with φ_k, adapt on that, and so on; data of every task, stacked.

        Each task's own φ_k, its own generator. A learner's `path` is lazy: φ_{k+1} is computed from index k after it is filled.
        """
        arrays = {k: v.cpu().numpy() for k, v in tasks.items()}
        rngs = [np.random.Generator(np.random.Philox(key=int(seed))) for seed in arrays.pop(SEED)]
        lived: list[Data] = [{} for _ in rngs]
        paths = [learner.path(meta, self, data, steps) for data in lived]
        thetas: list[Params] = []
        for k in range(steps + 1):
            began = time.perf_counter()
            with torch.no_grad():
                phis = [next(path) for path in paths]
            adapted = time.perf_counter() - began
            thetas = thetas or phis
            sampled = self.rollouts.rollout(arrays, self._actor(phis), rngs, testing=testing)
            began = time.perf_counter()
            for i, data in enumerate(lived):
                self._append(data, k, steps, phis[i], {name: v[i] for name, v in sampled.items()})
                if not testing:
                    self._watch(learner, data, k, steps, thetas[i], phis[i])
            adapted += time.perf_counter() - began
            for data in lived if not testing else ():
                data["adaptation_s"][k] = adapted / len(lived)
        return {k: torch.stack([d[k] for d in lived]) for k in lived[0]} | {k: v for k, v in tasks.items() if k == GROUP}

    def _watch(self, learner: Learner, data: Data, k: int, steps: int, theta: Params, phi: Params) -> None:
        """What tells whether adaptation does anything: the size of its gradient, and how far φ_k's actions are from θ's."""
        if not k:
            data |= {name: data["return"].new_zeros(steps + 1) for name in ("inner_grad_norm", "adaptation_kl", "adaptation_s")}
        if k < steps:
            moving, still = partition(phi, getattr(learner, "adapts", ("*",)))
            data["inner_grad_norm"][k] = tree.norm(differentiate(lambda p: self.support(still | p, data, k), moving)[0])
        with torch.no_grad():
            apart = policy_gradient.kl(self.distribution(theta, data, k), data["old"][k])
            data["adaptation_kl"][k] = policy_gradient.masked_mean(apart, data["mask"][k])

    def _actor(self, phis: list[Params]) -> Act:
        stacked = {k: torch.stack([phi[k] for phi in phis]) for k in phis[0]}
        whole = np.arange(len(phis))

        def act(which: Array, observations: Array, noise: Array) -> Array:
            weights = stacked if len(which) == len(whole) else {k: v[torch.from_numpy(which)] for k, v in stacked.items()}
            like = next(iter(weights.values()))
            x = torch.from_numpy(np.ascontiguousarray(observations)).to(like, copy=True)  # torch's own memory: alignment decides bits
            with torch.no_grad():
                mean, log_std = self._batched(weights, x).chunk(2, -1)
                actions = mean + torch.exp(log_std) * torch.from_numpy(np.ascontiguousarray(noise)).to(like, copy=True)
            result: Array = actions.cpu().numpy()
            return result

        return act

    def _batched(self, weights: Params, x: Tensor) -> Tensor:
        """The policy with weights [t, …] on x [t, k, o].

        By a graph that is traced once: what vmap and modules do in Python at every call takes longer than a small policy's
        arithmetic. Only for the first few shapes, which full waves have; where episodes end early there are many more.
        """

        def one(weights: Params, x: Tensor) -> Tensor:
            return self.policy(weights, x)

        key = (x.shape, x.dtype, x.device)
        if key not in self._graphs and len(self._graphs) < TRACED:
            self._graphs[key] = make_fx(torch.func.vmap(one))(weights, x)
        acting: Callable[..., Tensor] = self._graphs.get(key) or torch.func.vmap(one)
        return acting(weights, x)

    def _append(self, data: Data, k: int, steps: int, phi: Params, sampled: Arrays) -> None:
        """Fill index k of one task's data."""
        processed = self._processed(sampled)
        like = next(iter(phi.values()))
        new = {
            name: torch.from_numpy(v).to(like.device, like.dtype if v.dtype.kind == "f" else None, copy=True)
            for name, v in processed.items()
        }
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
            "physics_s": arrays["physics_s"], "policy_s": arrays["policy_s"],
        }  # fmt: skip


RECORDED = ("observations", "actions", "mask", "advantages", "first", "old", "old_log_p")
"""What is indexed by inner step."""
