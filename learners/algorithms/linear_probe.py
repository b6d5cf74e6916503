"""The baseline of Chen et al. 2019 ("A closer look at few-shot classification"): pre-train, then fit a new head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from learners.algorithms.heads import BIAS, HEAD, WEIGHT, barred, classes, classifies, features, membership, supervised
from learners.base import Data, Meta, Objective, Params, check_inner_loop
from learners.engine.optimisers import SGD, Adam, Optimiser
from learners.inner import InnerLoop, Loss, Point, last
from learners.objectives.attack import SupportAttacked
from learners.objectives.supervised import Supervised

FEATURES = "features"  # key of the support's, beside a task's own arrays


@dataclass(frozen=True)
class LinearProbe(InnerLoop):
    """φ is θ with a new head, k steps of gradient descent on the support's loss away from 0; the body stands still.

    What is trained: by default nothing adapts in training, and θ descends the query's loss under its own head. On tasks
    of the family `pretraining`, whose labels are class numbers, that is the paper's supervised pre-training on all
    training classes. On episodes, whose labels are shuffled, it teaches nothing: there a probe is for a θ that was
    learned otherwise (`init_from`, with `outer.lr = 0`). With `inner_steps` > 0 the body is trained by episodes through
    the probe, as by ANIL with a head that begins at 0.

    Before the first step φ is θ with its own head. The head is fitted on the whole support set; the paper's code takes
    batches of four, a hundred times through, with momentum and weight decay, at a rate of 0.01. Features are computed
    once. The model's last layer must be linear and named `head`; where targets are classes, those that the support
    does not show are never chosen.
    """

    single_loss: ClassVar[bool] = True

    inner_lr: float = 0.1
    """Rate at which the head is fitted."""
    inner_steps: int = 0
    """Steps in training: 0 trains θ as it is. At test there are as many as are evaluated."""
    inner_optimizer: Literal["sgd", "adam"] = "sgd"
    """What fits the head."""
    order: Literal[2, 1] = 2
    """With `inner_steps`: 2 differentiates through the fit, 1 takes the fitted head for a constant."""
    adapts: tuple[str, ...] = HEAD
    """What is fitted."""

    def __post_init__(self) -> None:
        check_inner_loop(self.inner_lr, self.inner_steps)

    def points(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Iterator[Point]:
        yield Point(meta.params | self.head(meta.params), {}, ())
        if not steps:
            return
        if isinstance(objective, SupportAttacked):  # against the head that the clean support gives
            clean = last(self.points(meta, objective.objective, data, steps)).params
            data, objective = objective.attacked(meta.slots | clean, data, 0), objective.objective
        objective = supervised(objective)
        z = features(objective, meta.slots | meta.params, data)
        begun = Meta(meta.params | self.begin(meta.params, objective, data, z), meta.slots)
        path = super().points(begun, objective, data | {FEATURES: z}, steps)
        next(path)
        for point in path:
            yield point._replace(params=point.params | self.head(point.params))

    def begin(self, theta: Params, objective: Supervised, data: Data, z: Tensor) -> Params:
        """What is fitted, before the first step, for a support set with features z [n, d]."""
        bias = 0 * theta[BIAS]
        if classifies(objective):
            bias = barred(bias, membership(data, z, classes(theta)))
        return {WEIGHT: 0 * theta[WEIGHT], BIAS: bias}

    def head(self, params: Params) -> Params:
        """The model's head, from what is fitted: here the same."""
        return {}

    def inner_loss(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Loss:
        objective = supervised(objective)
        task = {k: v for k, v in data.items() if k != "query_mask"} | {"query_y": data["support_y"]}
        if "support_mask" in data:
            task["query_mask"] = data["support_mask"]

        def loss(p: Params, step: int) -> Tensor:
            p = p | self.head(p)
            return objective.query_loss(data[FEATURES] @ p[WEIGHT].t() + p[BIAS], task)

        return loss

    def step_size(self, step: int) -> float:
        return self.inner_lr

    def optimiser(self) -> Optimiser:
        return Adam() if self.inner_optimizer == "adam" else SGD()

    def passes(self) -> int:
        """The query's, and one through the support's features where the fit is differentiated."""
        return 2 if self.inner_steps and self.order == 2 else 1
