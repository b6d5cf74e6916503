"""ADML, adversarial meta-learning (Yin, Tang, Xu, Wang 2018): clean and adversarial arms, crossed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from envs.base import Arrays
from learners.algorithms.maml import MAML
from learners.base import Data, Learner, Meta, Metrics, Objective, check_inner_loop
from learners.inner import last, support_losses
from learners.objectives.attack import Attack, SupportAttacked, attacked_query, drawn_starts


@dataclass(frozen=True)
class ADML(MAML):
    """Two arms from the same θ, each judged on what it was *not* adapted to:

    φ_a: adapted with rate α₁ to the attacked support set;   φ_c: adapted with rate α₂ to the clean one;
    outer loss  w · L(φ_a; Q) + (1 − w) · L(φ_c; Q_adv).

    The support is attacked at the current φ_a at each inner step; the query at φ_c (`attack_at = "adapted"`, the model
    that is judged on it) or at θ. The paper writes two outer lines with rates β₁, β₂, both from the same θ: for plain
    descent that is one step with w = β₁/(β₁+β₂), and one step is what is taken (two steps of Adam would be another
    thing). The crossing is as in the re-implementation of Goldblum, Fowl, Goldstein 2020; `pairing = "matched"` is the
    ablation in which each arm is judged on its own kind. At test it adapts to the support set as it is, with α₂.
    """

    single_loss: ClassVar[bool] = False

    inner_lr: float = 0.01
    """α₂, inner rate of the clean arm, and at test."""
    adversarial_lr: float = 0.01
    """α₁, inner rate of the adversarial arm."""
    attack: Attack = field(default_factory=Attack)
    """How both sets are attacked."""
    attack_at: Literal["adapted", "init"] = "adapted"
    """Parameters at which the query is attacked."""
    pairing: Literal["crossed", "matched"] = "crossed"
    """crossed: the paper's; matched: clean on clean, adversarial on adversarial."""
    clean_query_weight: float = 0.5
    """w, weight of the loss on the clean query set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_inner_loop(self.adversarial_lr, self.inner_steps)
        if not 0 <= self.clean_query_weight <= 1:
            raise ValueError(f"clean_query_weight={self.clean_query_weight}: a share from 0 to 1 wanted")

    def draw(self, data: Arrays, rng: np.random.Generator, steps: int) -> Arrays:
        return data | drawn_starts(self.attack, data, rng)

    def outer_loss(self, meta: Meta, objective: Objective, data: Data) -> tuple[Tensor, Metrics]:
        clean = last(self.points(meta, objective, data, self.inner_steps))
        against = SupportAttacked(objective, self.attack)
        robust = last(replace(self, inner_lr=self.adversarial_lr).points(meta, against, data, self.inner_steps))
        on_clean, on_attacked = (robust, clean) if self.pairing == "crossed" else (clean, robust)
        victim = on_attacked.params if self.attack_at == "adapted" else meta.params
        query_adv = attacked_query(self.attack, objective, meta.slots | victim, data)
        clean_loss = objective.query(meta.slots | on_clean.params, data)
        attacked_loss = objective.query(meta.slots | on_attacked.params, query_adv)
        w = self.clean_query_weight
        metrics = {"clean_query_loss": clean_loss, "adversarial_query_loss": attacked_loss}
        return w * clean_loss + (1 - w) * attacked_loss, metrics | support_losses(clean)

    def passes(self) -> int:
        """Two arms of MAML, an attack at each inner step of one of them, and one on the query."""
        return 2 * super().passes() + (self.inner_steps + 1) * self.attack.steps

    def at_test(self) -> Learner:
        return replace(self, attack=replace(self.attack, random_start=False))
