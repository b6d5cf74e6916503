"""Prototypical networks (Snell, Swersky, Zemel 2017) as a learner: adaptation is a new head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from learners.base import Data, Meta, Objective
from learners.inner import InnerLoop, Point
from learners.objectives import Supervised


@dataclass(frozen=True)
class ProtoNet(InnerLoop):
    """φ is θ with the head w_c = 2 p_c, b_c = −‖p_c‖², p_c the mean feature of class c's support.

    Its logits 2 z·p_c − ‖p_c‖² are −‖z − p_c‖² + ‖z‖², hence the softmax over squared distances. There are no inner steps: φ is the same
    after any number, and before the first one it is θ with its own head. The model's last layer must be linear and named `head`.
    """

    inner_steps: int = 1
    """Any number gives the same."""
    adapts: tuple[str, ...] = ("head*",)
    """What is replaced."""

    def points(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Iterator[Point]:
        if not isinstance(objective, Supervised) or objective.loss != "cross_entropy":
            raise ValueError("prototypes are of classes: a classification task wanted")
        theta = meta.params
        yield Point(theta, {}, ())
        if steps:
            z = objective.model.features(meta.slots | theta, data["support_x"])
            labels = torch.arange(theta["head.bias"].shape[0], device=z.device)
            member = (data["support_y"][:, None] == labels).to(z.dtype)  # [n, ways]
            prototypes = member.t() @ z / member.sum(0)[:, None]
            adapted = theta | {"head.weight": 2 * prototypes, "head.bias": -prototypes.square().sum(1)}
            for _ in range(steps):
                yield Point(adapted, {}, ())

    def passes(self) -> int:
        return 2
