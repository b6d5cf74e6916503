"""Baseline++ of Chen et al. 2019: pre-training and a new head, both by cosine similarity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.algorithms.heads import BIAS, WEIGHT, barred, classes, classifies, membership, prototypes, supervised
from learners.algorithms.linear_probe import LinearProbe
from learners.base import Data, Meta, Objective, Params
from learners.inner import Point
from learners.models.unit import UnitFeatures, unit
from learners.objectives.attack import SupportAttacked
from learners.objectives.supervised import Supervised


@dataclass(frozen=True)
class BaselinePlusPlus(LinearProbe):
    """The linear probe with logits s cos(z, v_c): the head is w_c = s v_c/‖v_c‖ without bias, v is what is learned, in
    training and at test, and the model gives features of length 1 (`unit`).

    v begins at the classes' mean features (Qi, Brown, Lowe 2018), not at random as in the paper: nothing is drawn.
    """

    scale: float = 10.0
    """s, which stays. The published code has 2 for up to 200 classes beside a norm learned per class, else 10."""
    adapts: tuple[str, ...] = (WEIGHT,)
    """What is fitted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale}: more than 0 wanted")

    def points(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Iterator[Point]:
        plain = objective.objective if isinstance(objective, SupportAttacked) else objective
        if not classifies(supervised(plain)):
            raise ValueError("cosines are of classes: a classification task wanted")
        if not any(isinstance(m, UnitFeatures) for m in supervised(plain).model.module.modules()):
            raise ValueError("features of length 1 wanted: a model `unit`, or a layer UnitFeatures before the head")
        unbiased = meta.params | {BIAS: torch.zeros_like(meta.params[BIAS])}
        return super().points(Meta(unbiased, meta.slots), objective, data, steps)

    def begin(self, theta: Params, objective: Supervised, data: Data, z: Tensor) -> Params:
        member = membership(data, z, classes(theta))
        return {WEIGHT: prototypes(z, member), BIAS: barred(theta[BIAS], member)}

    def head(self, params: Params) -> Params:
        return {WEIGHT: self.scale * unit(params[WEIGHT])}
