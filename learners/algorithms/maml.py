"""MAML and its first-order variant (Finn, Abbeel, Levine 2017, Algorithms 1–2); ANIL and BOIL by what `adapts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from learners.base import check_inner_loop
from learners.inner import InnerLoop


@dataclass(frozen=True)
class MAML(InnerLoop):
    """φ_{k+1} = φ_k − α ∇L_S(φ_k), φ₀ = θ;  ∇θ L_Q(φ_K) = [Π_k (I − α H_S(φ_k))]ᵀ ∇L_Q(φ_K).

    `order = 1` is FOMAML: the inner gradients are constants, so the product is dropped and ∇L_Q(φ_K) remains.
    α is in units of the objective's loss: a mean cross-entropy wants N times cbfinn's rate (see `Supervised`).

    `adapts = ["head*"]` is ANIL (Raghu et al. 2020): the body is meta-learned and stands still inside, which puts
    D = diag(0, α) in place of α. The complement, `adapts = ["block*"]` on Conv4, is BOIL (Oh et al. 2021); our presets
    take `["*conv*"]`, which leaves the normalisation still.
    """

    single_loss: ClassVar[bool] = True

    inner_lr: float = 0.01
    """α, the rate of the inner loop."""
    inner_steps: int = 1
    """K, inner steps in meta-training."""
    order: Literal[2, 1] = 2
    """2: differentiate through the inner loop; 1: first-order approximation (FOMAML)."""
    adapts: tuple[str, ...] = ("*",)
    """Patterns of the parameters that the inner loop moves."""
    later_lr: float = 0.0
    """Rate of every inner step after the first (the paper's RL tests halve it); 0: α."""

    def __post_init__(self) -> None:
        check_inner_loop(min(self.inner_lr, self.later_lr), self.inner_steps)

    def step_size(self, step: int) -> float:
        return self.later_lr if step and self.later_lr else self.inner_lr
