"""Prototypical networks (Snell, Swersky, Zemel 2017) as a learner: adaptation is a new head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from learners.base import Data, Meta, Objective, Params
from learners.inner import InnerLoop, Point
from learners.objectives.attack import SupportAttacked
from learners.objectives.supervised import Supervised


@dataclass(frozen=True)
class ProtoNet(InnerLoop):
    """φ is θ with the head w_c = 2 p_c, b_c = −‖p_c‖², p_c the mean feature of class c's support.

    Its logits 2 z·p_c − ‖p_c‖² are −‖z − p_c‖² + ‖z‖², hence the softmax over squared distances. There are no inner
    steps: φ is the same after any number, and before the first one it is θ with its own head. The model's last layer
    must be linear and named `head`.
    """

    single_loss: ClassVar[bool] = True

    inner_steps: int = 1
    """Any number gives the same."""
    adapts: tuple[str, ...] = ("head*",)
    """What is replaced."""

    def __post_init__(self) -> None:
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps={self.inner_steps}: at least 1 wanted, or the prototypes are never used")

    def points(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Iterator[Point]:
        yield Point(meta.params, {}, ())
        if not steps:
            return
        if isinstance(objective, SupportAttacked):  # against the clean support's prototypes: θ's own head is never used
            adapted = _adapted(meta, objective.objective, data)
            data, objective = objective.attacked(meta.slots | adapted, data, 0), objective.objective
        adapted = _adapted(meta, objective, data)
        for _ in range(steps):
            yield Point(adapted, {}, ())

    def passes(self) -> int:
        return 2


def _adapted(meta: Meta, objective: Objective, data: Data) -> Params:
    if not isinstance(objective, Supervised) or not objective.classifies:
        raise ValueError("prototypes are of classes: a classification task wanted")
    z = objective.model.features(meta.slots | meta.params, data["support_x"], objective.own())
    labels = torch.arange(meta.params["head.bias"].shape[0], device=z.device)
    member = (data["support_y"][:, None] == labels).to(z.dtype)  # [n, ways]
    prototypes = member.t() @ z / member.sum(0)[:, None]
    return meta.params | {"head.weight": 2 * prototypes, "head.bias": -prototypes.square().sum(1)}
