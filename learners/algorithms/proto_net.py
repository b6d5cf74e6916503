"""Prototypical networks (Snell, Swersky, Zemel 2017) as a learner: adaptation is a new head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from learners.algorithms.heads import HEAD, prototypical
from learners.base import Data, Meta, Objective
from learners.inner import InnerLoop, Point


@dataclass(frozen=True)
class ProtoNet(InnerLoop):
    """φ is θ with the head w_c = 2 p_c, b_c = −‖p_c‖², p_c the mean feature of class c's support.

    Its logits 2 z·p_c − ‖p_c‖² are −‖z − p_c‖² + ‖z‖², hence the softmax over squared distances. A class that the
    support does not show is never chosen. There are no inner steps: φ is the same after any number, and before the
    first one it is θ with its own head. The model's last layer must be linear and named `head`.
    """

    single_loss: ClassVar[bool] = True

    inner_steps: int = 1
    """Any number gives the same."""
    adapts: tuple[str, ...] = HEAD
    """What is replaced."""

    def __post_init__(self) -> None:
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps={self.inner_steps}: at least 1 wanted, or the prototypes are never used")

    def points(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Iterator[Point]:
        yield Point(meta.params, {}, ())
        if not steps:
            return
        adapted = prototypical(meta, objective, data)
        for _ in range(steps):
            yield Point(adapted, {}, ())

    def passes(self) -> int:
        return 2
