"""TRPO as an outer step (Schulman et al. 2015; Finn et al. 2017, §5.3), distributed: vectors go out, sums come back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from learners.base import (
    Data,
    Fixed,
    Learner,
    Meta,
    Objective,
    Params,
    Reduce,
    Share,
    Sum,
    Verb,
    Verbs,
    training_steps,
    unpack,
)
from learners.engine import tree
from learners.engine.conjugate_gradient import conjugate_gradient
from learners.engine.derivative import gauss_newton
from learners.inner import model_params, single_loss
from learners.objectives import policy_gradient


@runtime_checkable
class Stochastic(Objective, Protocol):
    """An objective with a policy whose distribution can be held near its old one."""

    def distribution(self, params: Params, data: Data, step: int = -1) -> Tensor:
        """Means and log standard deviations [n, 2a] on the time steps of index `step`."""

    def exploration_loss(self, theta: Params, data: Data) -> Tensor:
        """What the outer loss adds for θ itself."""


@dataclass(frozen=True)
class TrustRegion:
    """θ ← θ − s x,  x ≈ (H + damping)⁻¹ g,  s = √(2δ / xᵀHx), shortened until the surrogate falls and KL ≤ δ.

    g is the mean over tasks of the meta-gradient. KL(old ‖ new) is that of the *adapted* policies, over all time steps
    of all tasks. Its gradient vanishes at θ, so its Hessian there is exactly H = Jᵀ F J with J = dφ/dθ and F the Fisher
    matrix of the adapted policy: one jvp and one vjp through the inner loop per product, and no third derivatives.
    Where no step helps, θ stays.
    """

    max_kl: float = 0.01
    """δ, the radius of the trust region."""
    solver_steps: int = 10
    """Steps of conjugate gradient; each is a round over the tasks."""
    damping: float = 1e-5
    """Added to the diagonal of H."""
    shrink: float = 0.8
    """Factor between the steps that are tried."""
    tries: int = 15
    """Steps that are tried."""
    curvature_every: int = 1
    """Estimate H on every so many time steps."""

    def __post_init__(self) -> None:
        if self.max_kl <= 0 or not 0 < self.shrink < 1 or self.damping < 0:
            raise ValueError(
                f"max_kl={self.max_kl}, shrink={self.shrink}, damping={self.damping}: > 0, between 0 and 1, and ≥ 0 "
                "wanted"
            )
        if min(self.solver_steps, self.tries, self.curvature_every) < 1:
            raise ValueError(
                f"solver_steps={self.solver_steps}, tries={self.tries}, curvature_every={self.curvature_every}: at "
                "least 1 wanted"
            )

    def init(self, meta: Meta) -> Params:
        return {"step": torch.zeros((), dtype=torch.float64)}

    def verbs(self, learner: Learner, objective: Objective) -> Verbs:
        if not isinstance(objective, Stochastic):
            raise ValueError(f"a trust region wants a policy, not {objective.summary()}; choose --outer.name descent")
        if not single_loss(learner):
            raise ValueError(
                f"a trust region is about the loss after adaptation; {type(learner).__name__} wants --outer.name "
                "descent"
            )
        if self.curvature_every > 1 and getattr(objective, "inner_loss", "") == "dice":
            raise ValueError(
                f"curvature_every={self.curvature_every}: inner_loss='dice' needs every time step, 1 wanted"
            )
        policy, every, steps = objective, self.curvature_every, training_steps(learner)

        def adapted(meta: Meta, params: Params, data: Data) -> Tensor:
            """The adapted policy's distribution on its own time steps."""
            return policy.distribution(learner.adapt(Meta(params, meta.slots), policy, data, steps), data)

        def curvature(at: Params, data: Data) -> Fixed:
            meta, data = unpack(at), _thinned(data, every)
            mask = data["mask"][-1]
            product = gauss_newton(
                lambda p: adapted(meta, p, data), meta.params, lambda value, u: _fisher(value, u) * mask.unsqueeze(-1)
            )
            return lambda v: Share(product(v), mask.sum(), {})

        def surrogate(at: Params, operand: Params, data: Data) -> Share:
            meta = unpack(at)
            mask = data["mask"][-1]
            with torch.no_grad():
                phi = learner.adapt(Meta(operand, meta.slots), policy, data, steps)
                away = (policy_gradient.kl(data["old"][-1], policy.distribution(phi, data)) * mask).sum()
                loss = policy.query(meta.slots | phi, data) + policy.exploration_loss(
                    meta.slots | model_params(operand), data
                )
            return Share({"loss": loss, "kl": away, "steps": mask.sum()}, torch.ones_like(loss), {})

        return {
            "curvature": Verb(lambda at, v, data: curvature(at, data)(v), fix=curvature),
            "surrogate": Verb(surrogate),
        }

    def step(self, meta: Meta, state: Params, reduce: Reduce) -> tuple[Meta, Params, dict[str, float]]:
        grads, slots = unpack(reduce("gradient", None).mean())
        state = {"step": state["step"] + 1}

        def product(v: Params) -> Params:
            return tree.add(reduce("curvature", v).mean(), tree.scale(self.damping, v))

        x, residual = conjugate_gradient(product, grads, self.solver_steps)
        curved = float(tree.dot(x, tree.sub(grads, residual)))  # xᵀ(H + damping)x
        metrics = {"outer/grad_norm": float(tree.norm(grads)), "outer/solver_residual": float(tree.norm(residual))}
        if curved <= 0:
            return (
                Meta(meta.params, slots),
                state,
                metrics | {"outer/kl": 0.0, "outer/tries": 0.0, "outer/improvement": 0.0},
            )
        full = tree.scale((2 * self.max_kl / curved) ** 0.5, x)
        before, apart = _judged(reduce("surrogate", meta.params))
        metrics["outer/kl_before"] = apart  # 0 up to rounding, or the workers do not repeat what they recorded
        for tried in range(self.tries):
            candidate = tree.sub(meta.params, tree.scale(self.shrink**tried, full))
            loss, away = _judged(reduce("surrogate", candidate))
            if loss < before and away <= self.max_kl:
                found = {"outer/kl": away, "outer/tries": float(tried + 1), "outer/improvement": before - loss}
                return Meta(candidate, slots), state, metrics | found
        return (
            Meta(meta.params, slots),
            state,
            metrics | {"outer/kl": 0.0, "outer/tries": float(self.tries), "outer/improvement": 0.0},
        )


def _fisher(distribution: Tensor, v: Tensor) -> Tensor:
    """F v for diagonal normal distributions in (mean, log σ): 1/σ² and 2."""
    mean, log_std = v.chunk(2, -1)
    return torch.cat([mean * torch.exp(-2 * distribution.chunk(2, -1)[1]), 2 * log_std], -1)


def _judged(total: Sum) -> tuple[float, float]:
    """(mean loss over tasks, mean KL over time steps)."""
    return float(total.total["loss"]) / total.weight, float(total.total["kl"] / total.total["steps"])


def _thinned(data: Data, every: int) -> Data:
    """Every so many time steps of data [steps, n, …]."""
    return {k: v[:, ::every] if v.ndim > 1 else v for k, v in data.items()} if every > 1 else data
