"""Meta-SGD (Li, Zhou, Chen, Li 2017): learn the initialisation, and a rate for each of its entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F

from learners.base import Meta, Params, check_inner_loop
from learners.engine import tree
from learners.inner import Direction, InnerLoop, partition

ALPHA = "alpha"


@dataclass(frozen=True)
class MetaSGD(InnerLoop):
    """φ_{k+1} = φ_k − α ∘ ∇L_S(φ_k), φ₀ = θ; α of θ's shape, and θ and α under one outer optimiser (Algorithm 1).

    For one step  ∇θ = (I − diag(α) H_S)ᵀ g_Q(φ)  and  ∇α = −g_S(θ) ∘ g_Q(φ). α may become negative: it learns the
    direction as well as the rate. The paper takes one step, in training and at test; with more, α is shared.
    It begins as one number for all entries, drawn from U[lowest_rate, highest_rate].

    `order = 1` takes the inner gradients for constants; α is learned all the same.
    `rate` says what the outer optimiser sees: α itself (the paper), or a with α = log(1 + eᵃ) or α = eᵃ, always
    positive.
    """

    single_loss: ClassVar[bool] = True

    inner_steps: int = 1
    """K, inner steps in meta-training."""
    order: Literal[2, 1] = 2
    """2: differentiate through the inner loop; 1: first-order approximation."""
    rate: Literal["raw", "softplus", "exp"] = "raw"
    """How α is parametrised."""
    lowest_rate: float = 0.005
    """Lower end of the interval that the first α is drawn from."""
    highest_rate: float = 0.1
    """Upper end of it."""
    adapts: tuple[str, ...] = ("*",)
    """Patterns of the parameters that the inner loop moves; the others get no α."""

    def __post_init__(self) -> None:
        check_inner_loop(self.lowest_rate, self.inner_steps)
        if self.highest_rate < self.lowest_rate:
            raise ValueError(f"highest_rate={self.highest_rate} is below lowest_rate={self.lowest_rate}")
        if self.rate != "raw" and self.lowest_rate <= 0:
            raise ValueError(f"lowest_rate={self.lowest_rate}: rate={self.rate!r} wants a positive one")

    def init(self, params: Params, rng: np.random.Generator) -> Meta:
        alpha = float(rng.uniform(self.lowest_rate, self.highest_rate))
        start = {
            "raw": alpha,
            "softplus": float(np.log(np.expm1(alpha))) if alpha > 0 else 0.0,
            "exp": float(np.log(alpha or 1.0)),
        }
        moving, _ = partition(params, self.adapts)
        return Meta(
            params | tree.with_prefix(ALPHA, tree.apply(lambda v: torch.full_like(v, start[self.rate]), moving)), {}
        )

    def direction(self, meta: Meta) -> Direction:
        alpha = self.rates(meta.params)
        return lambda grads, step: tree.multiply(alpha, grads)

    def rates(self, params: Params) -> Params:
        """α by parameter."""
        parametrised = {"raw": lambda a: a, "softplus": F.softplus, "exp": torch.exp}[self.rate]
        return tree.apply(parametrised, tree.under(ALPHA, params))
