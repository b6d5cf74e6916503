"""Proto-MAML (Triantafillou et al. 2020, Meta-Dataset, §3): MAML whose head begins as a prototypical network's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from learners.algorithms.heads import prototypical
from learners.algorithms.maml import MAML
from learners.base import Data, Meta, Objective
from learners.engine import tree
from learners.inner import Point


@dataclass(frozen=True)
class ProtoMAML(MAML):
    """φ₀ is θ with the head w_c = 2 p_c, b_c = −‖p_c‖², p_c the mean feature of class c's support at θ; from there as
    MAML:  φ_{k+1} = φ_k − α ∇L_S(φ_k),  and ∇θ L_Q(φ_K(φ₀(θ))).

    θ's own head is never used and its gradient is 0, so that the order of the classes means nothing, and tasks may
    have fewer of them than the model. Without inner steps it is a prototypical network. `order = 1` is the paper's
    fo-Proto-MAML: inner gradients are constants, but φ₀ is differentiated all the same, as in the paper; without that,
    the body would never hear that its features make the head. The paper finds rate and steps by search; the defaults
    are ours. The model's last layer must be linear and named `head`.
    """

    inner_lr: float = 0.01
    """α, the rate of the inner loop."""
    inner_steps: int = 5
    """K, inner steps in meta-training, after the head's initialisation."""

    def points(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Iterator[Point]:
        # The head is a function of the body: autograd must not walk from one to the other where an inner step asks for
        # the gradient of each. A view is a node of its own.
        begun = tree.apply(lambda v: v.view_as(v), prototypical(meta, objective, data))
        return super().points(Meta(begun, meta.slots), objective, data, steps)

    def passes(self) -> int:
        """MAML's, and one through the prototypes."""
        return super().passes() + 1
