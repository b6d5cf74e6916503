"""The policy-gradient objective of RL tasks, on recorded time steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from learners.base import Data, Learner, Meta, Metrics, Params
from learners.modules.functional import Functional
from learners.objectives import policy_gradient
from learners.objectives.policy_gradient import InnerLoss
from learners.objectives.recording import Recorder, Rollouts

EXPLORATION = "exploration"
RUNNING = ("mean", "square", "weight")
LEAST_DEVIATION = 1e-3  # of returns, relative to their mean, that is no rounding
FOLLOW = 0.1  # of the way to this iteration's returns: how the baseline of the exploration term moves


@dataclass(frozen=True)
class Control:
    """A policy that adapts by policy gradient to episodes that it has sampled itself.

    A task's data are time steps [steps + 1, n, …]: index k holds what φ_k has sampled. Inner step k descends the inner
    loss on index k;  `query` is the surrogate  −mean π_φ(a|s)/π_old(a|s) · A  on the last index, sampled by the adapted
    policy, never by θ.

    With `exploration` = c > 0 the outer loss also holds  −c R̂ · mean log π_θ(a|s)  on index 0, R̂ being the adapted
    policy's return, standardised by a running mean and variance: what θ samples is credited with what adaptation makes
    of it (E-MAML, Stadie et al. 2018).
    """

    policy: Functional
    rollouts: Rollouts
    inner_loss: InnerLoss = "log_likelihood"
    discount: float = 0.99
    gae: float = 1.0
    exploration: float = 0.0
    device: str = "cpu"
    _recorder: Recorder = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_recorder", Recorder(self.policy, self.rollouts, self.discount, self.gae))

    def support(self, params: Params, data: Data, step: int) -> Tensor:
        part = {k: v[step] for k, v in data.items() if k in RECORDED}
        log_p = policy_gradient.log_prob(self.policy(params, part["observations"]), part["actions"])
        return policy_gradient.inner_loss(self.inner_loss, log_p, part["old_log_p"], part)

    def query(self, params: Params, data: Data) -> Tensor:
        part = {k: v[-1] for k, v in data.items() if k in RECORDED}
        log_p = policy_gradient.log_prob(self.policy(params, part["observations"]), part["actions"])
        return -policy_gradient.masked_mean(torch.exp(log_p - part["old_log_p"]) * part["advantages"], part["mask"])

    def exploration_loss(self, theta: Params, data: Data) -> Tensor:
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
        """Means and log standard deviations [n, 2a] on the time steps of index `step`, by default the adapted
        policy's.
        """
        outputs: Tensor = self.policy(params, data["observations"][step])
        return outputs

    def measure(self, params: Params, data: Data) -> Metrics:
        return {"surrogate": self.query(params, data)}

    def predict(self, params: Params, data: Data, x: Tensor) -> Tensor:
        """Mean actions [n, a] on observations x [n, o]."""
        mean: Tensor = self.policy(params, x).chunk(2, -1)[0]
        return mean

    def record(self, learner: Learner, meta: Meta, tasks: Data, steps: int, *, testing: bool = False) -> Data:
        """Live through the tasks of a shard: the stacked data that `support`, `query` and `curve` are of."""
        lived = self._recorder.lived(self, learner, meta, tasks, steps, testing=testing)
        if self.policy.draws:
            raise ValueError(
                f"{type(self.policy.module).__name__} draws (dropout): the ratio of two policies is of two functions; "
                "functional(module, dropout='off') wanted"
            )
        return lived

    def curve(self, data: Data) -> Metrics:
        """Mean return of φ₀ … φ_steps' episodes [steps + 1], of one task."""
        return {"return": data["return"]}

    def facts(self, data: Data) -> Metrics:
        """Scalars of one task to log; those under `perf/` and `count/` are to be added up over tasks."""
        returns, steps = data["return"], range(len(data["return"]) - 1)
        each = {f"inner_grad_norm_step{k}": data["inner_grad_norm"][k] for k in steps}
        moved = {f"adaptation_kl_step{k + 1}": data["adaptation_kl"][k + 1] for k in steps}
        costs = {f"perf/{name}": data[name].sum() for name in ("physics_s", "policy_s", "adaptation_s")}
        return (
            {"adaptation_gain": returns[-1] - returns[0]}
            | each
            | moved
            | costs
            | {"count/env_steps": data["mask"].sum()}
        )

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
        constants = self.policy.summary()
        return (
            f"policy gradient ({self.inner_loss}, discount {self.discount:g}, GAE {self.gae:g}{exploration})"
            f"{f', {constants}' if constants else ''}"
        )


RECORDED = ("observations", "actions", "mask", "advantages", "first", "old", "old_log_p")
"""What is indexed by inner step."""
