"""CAVIA (Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson 2019): a task is a few context parameters, the rest is shared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from learners.algorithms.maml import MAML
from learners.base import Data, Meta, Objective, Params
from learners.engine import tree
from learners.inner import Point, partition


@dataclass(frozen=True)
class CAVIA(MAML):
    """c₀ = 0, c_{k+1} = c_k − α ∇_c L_S(c_k, θ);  ∇θ L_Q(c_K(θ), θ)   (Algorithm 1).

    θ stands still inside and is learned by the outer step alone; c begins every task at 0, so that its own outer
    gradient is 0 and what the model's initialisation gave it is not used. How c enters is the module's business: any
    parameter will do whose name matches `adapts` (`context_mlp` and `context_conv4` have the paper's two ways). The
    whole of a task is then the numbers in c. The rate of 1 and the single step (images: 2) are the published code's;
    gradients with respect to c want no small rate, since θ scales them as it likes.
    """

    inner_lr: float = 1.0
    """α, the rate of the context parameters."""
    adapts: tuple[str, ...] = ("context", "*.context")
    """Patterns of the context parameters."""

    def points(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Iterator[Point]:
        return super().points(Meta(self._begun(meta.params), meta.slots), objective, data, steps)

    def init(self, params: Params, rng: np.random.Generator) -> Meta:
        return Meta(self._begun(params), {})

    def _begun(self, params: Params) -> Params:
        """With the context at 0, in the same order of names."""
        context, _ = partition(params, self.adapts)
        zero = tree.scale(0.0, context)  # still of θ's graph, as `differentiate` wants all or none of them to be
        return {k: zero.get(k, v) for k, v in params.items()}
