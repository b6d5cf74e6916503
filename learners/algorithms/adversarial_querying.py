"""Adversarial querying (Goldblum, Fowl, Goldstein 2020): adapt to clean support, answer attacked queries."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from torch import Tensor

from envs.base import Arrays
from learners.algorithms.maml import MAML
from learners.base import Data, Learner, Meta, Metrics, Objective
from learners.inner import last, support_losses
from learners.objectives.attack import Attack, attacked_query, drawn_starts


@dataclass(frozen=True)
class AdversarialQuerying(MAML):
    """φ = MAML's adaptation to the clean support set;  outer loss L(φ; Q_adv), Q_adv attacked at φ.

    One arm, and no attack inside the inner loop: cheaper than ADML. The default attack is the paper's: PGD of 7 steps,
    ε = 8/255, step 2/255.
    """

    single_loss: ClassVar[bool] = False

    inner_steps: int = 5
    """K, inner steps in meta-training."""
    attack: Attack = field(default_factory=lambda: Attack(eps=8 / 255, steps=7, step_size=2 / 255, random_start=True))
    """How the query set is attacked."""

    def draw(self, data: Arrays, rng: np.random.Generator, steps: int) -> Arrays:
        return data | drawn_starts(self.attack, data, rng)

    def outer_loss(self, meta: Meta, objective: Objective, data: Data) -> tuple[Tensor, Metrics]:
        end = last(self.points(meta, objective, data, self.inner_steps))
        phi = meta.slots | end.params
        return objective.query(phi, attacked_query(self.attack, objective, phi, data)), support_losses(end)

    def passes(self) -> int:
        """MAML's, and the attack's."""
        return super().passes() + self.attack.steps

    def at_test(self) -> Learner:
        return replace(self, attack=replace(self.attack, random_start=False))
