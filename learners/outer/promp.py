"""ProMP as an outer step (Rothfuss et al. 2019, Algorithm 1): several Adam steps on the same episodes, clipped and held
near.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learners.base import (
    Data,
    Learner,
    Meta,
    Metrics,
    Objective,
    Params,
    Reduce,
    Share,
    Verb,
    Verbs,
    pack,
    training_steps,
    unpack,
)
from learners.engine import tree
from learners.engine.derivative import differentiate_with
from learners.inner import model_params, single_loss
from learners.objectives import policy_gradient
from learners.outer.descent import Descent
from learners.outer.trust_region import Stochastic


@dataclass(frozen=True)
class ProMP:
    """Per task, with φ = φ_K(θ') for a candidate θ' and everything old sampled at θ, descend by Adam

    −mean min(r A, clip(r, 1 ± ε) A) + η/K Σ_{k<K} mean KL(π_old ‖ π_{φ_k(θ')}),   r = π_φ(a|s) / π_old(a|s).

    The ratio is over what the adapted policy sampled, the divergence over what φ₀ … φ_{K−1} sampled. With
    `control.inner_loss = "likelihood_ratio"` the inner steps are those of the paper (low-variance curvature). The first
    epoch is the meta-gradient itself: at θ both agree.
    """

    lr: float = 1e-3
    """Adam's rate."""
    epochs: int = 5
    """Steps on the same episodes; each is a round over the tasks."""
    clip: float = 0.3
    """ε."""
    kl_penalty: float = 5e-4
    """η."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.clip <= 0 or self.kl_penalty < 0 or self.lr < 0:
            raise ValueError(
                f"epochs={self.epochs}, clip={self.clip}, kl_penalty={self.kl_penalty}, lr={self.lr}: at least 1, > 0, "
                "≥ 0 and ≥ 0 wanted"
            )

    def init(self, meta: Meta) -> Params:
        return self._adam().init(meta)

    def verbs(self, learner: Learner, objective: Objective) -> Verbs:
        if not isinstance(objective, Stochastic):
            raise ValueError(f"ProMP wants a policy, not {objective.summary()}; choose --outer.name descent")
        if not single_loss(learner):
            raise ValueError(
                f"ProMP is about the loss after adaptation; {type(learner).__name__} wants --outer.name descent"
            )
        policy, steps = objective, training_steps(learner)

        def proximal(at: Params, operand: Params, data: Data) -> Share:
            slots = unpack(at).slots

            def loss(params: Params) -> tuple[Tensor, Metrics]:
                phis = list(learner.path(Meta(params, slots), policy, data, steps))
                clipped = self._clipped(policy.distribution(phis[-1], data), data)
                apart = torch.stack([_mean(policy_gradient.kl(data["old"][k], policy.distribution(phis[k], data, k)),
                                     data, k)
                                     for k in range(steps)]).mean() if steps else clipped.new_zeros(())  # fmt: skip
                return clipped + self.kl_penalty * apart + policy.exploration_loss(
                    slots | model_params(params), data
                ), {"inner_kl": apart}

            grads, value, metrics = differentiate_with(loss, operand)
            return Share(grads, torch.ones_like(value), {"proximal_loss": value} | metrics)

        return {"proximal": Verb(proximal)}

    def step(self, meta: Meta, state: Params, reduce: Reduce) -> tuple[Meta, Params, dict[str, float]]:
        first = unpack(reduce("gradient", None).mean())
        params, grads, metrics = meta.params, first.params, {"outer/grad_norm": float(tree.norm(first.params))}
        for epoch in range(self.epochs):
            if epoch:
                grads = reduce("proximal", params).mean()
            moved, state, _ = self._adam().apply(Meta(params, {}), state, pack(grads, {}), 1.0)
            params = moved.params
        return (
            Meta(params, first.slots),
            state,
            metrics | {"outer/step_norm": float(tree.norm(tree.sub(params, meta.params)))},
        )

    def _adam(self) -> Descent:
        return Descent(lr=self.lr)

    def _clipped(self, distribution: Tensor, data: Data) -> Tensor:
        ratio = torch.exp(policy_gradient.log_prob(distribution, data["actions"][-1]) - data["old_log_p"][-1])
        advantage = data["advantages"][-1]
        return -_mean(torch.minimum(ratio * advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage), data, -1)


def _mean(values: Tensor, data: Data, step: int) -> Tensor:
    return policy_gradient.masked_mean(values, data["mask"][step])
