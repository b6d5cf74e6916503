"""Implicit MAML (Rajeswaran, Finn, Kakade, Levine 2019): the gradient of the solution, not of the path to it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from learners.base import Data, Gradient, Meta, Objective, Params, check_inner_loop
from learners.engine import tree
from learners.engine.conjugate_gradient import conjugate_gradient
from learners.engine.derivative import differentiate, linearised
from learners.inner import InnerLoop, Loss, last, partition, support_losses


@dataclass(frozen=True)
class IMAML(InnerLoop):
    """φ* = argmin_φ L_S(φ) + λ/2 ‖φ − θ‖²;   ∇θ L_Q(φ*) = (I + H_S(φ*)/λ)⁻¹ ∇L_Q(φ*)   (Algorithms 1–2).

    φ* is approached by `inner_steps` gradient steps on the proximal loss, from θ; the linear system is solved by
    conjugate gradient. Memory does not grow with the number of inner steps. Exact as both become many; the system is
    the paper's (the published code, by a swapped argument, solves another one).

    Parameters s that do not adapt act through φ* too:  ∂L_Q/∂s − (∂_s ∇_φ L_S)ᵀ x / λ  with x the solution above.
    """

    inner_lr: float = 0.1
    """α, the rate of the inner loop."""
    inner_steps: int = 16
    """Inner steps towards φ*."""
    proximal: float = 2.0
    """λ, the strength of the pull towards θ."""
    solver_steps: int = 5
    """Steps of conjugate gradient."""
    adapts: tuple[str, ...] = ("*",)
    """Patterns of the parameters that the inner loop moves."""

    def __post_init__(self) -> None:
        check_inner_loop(self.inner_lr, self.inner_steps)
        if self.proximal <= 0 or self.solver_steps < 0:
            raise ValueError(
                f"proximal={self.proximal}, solver_steps={self.solver_steps}: more than 0, and 0 or more wanted"
            )

    def inner_loss(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Loss:
        theta = meta.params

        def proximal(p: Params, step: int) -> Tensor:
            away = tree.sub({k: p[k] for k in theta}, theta)
            return objective.support(meta.slots | p, data, step) + self.proximal / 2 * tree.dot(away, away)

        return proximal

    def step_size(self, step: int) -> float:
        return self.inner_lr

    def again(self, meta: Meta) -> bool:
        return False

    def gradient(self, meta: Meta, objective: Objective, data: Data) -> Gradient:
        end = last(self.points(meta, objective, data, self.inner_steps))
        outer, query_loss = differentiate(lambda p: objective.query(meta.slots | p, data), end.params)
        moving, still = partition(end.params, self.adapts)
        curvature = linearised(lambda p: objective.support(meta.slots | p, data, self.inner_steps - 1), end.params)
        zero = tree.zeros_like(still)

        def scaled(v: Params) -> Params:
            """The columns of ∇²L_S/λ that belong to what adapts, times v."""
            return tree.scale(1 / self.proximal, curvature(v | zero))

        x, residual = conjugate_gradient(
            lambda v: tree.add(v, scaled(v)), {k: outer[k] for k in moving}, self.solver_steps
        )
        indirect = scaled(x) if still else {}
        grads = {k: x[k] if k in x else g - indirect[k] for k, g in outer.items()}
        metrics = {"query_loss": query_loss, "grad_norm": tree.norm(grads), "solver_residual": tree.norm(residual)}
        return Gradient(grads, self.slots(meta, objective, data), metrics | support_losses(end))

    def passes(self) -> int:
        """K inner gradients, the query's, and one with as many products for the linear system."""
        return self.inner_steps + 2 + self.solver_steps

    def claim(self) -> str:
        return "implicit"
