"""Pre-training of teachers: ordinary classifiers of a few classes, with running statistics for BatchNorm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from envs.base import TEACHER, Arrays
from learners.base import Data, Learner, Meta, Objective, Params, Reduce, Share, Verb, Verbs
from learners.engine.derivative import differentiate_with
from learners.engine.optimisers import SGD, Adam, Optimiser, clip_by_norm
from learners.modules.functional import Functional
from learners.modules.normalisation import BATCH
from learners.purer.inversion import FROZEN

MOMENTUM = 0.1  # of running statistics, as in torch


@dataclass(frozen=True)
class Schooling:
    """How teachers are trained: the official code's constants but the batch (Conv4: Adam; ResNets: SGD with momentum
    and weight decay).
    """

    epochs: int = 60
    """Passes over the images."""
    batch: int = 16
    """Images per step (official: 128 of about 2400; sets with some tens of images per class need more steps than that
    gives)."""
    conv_lr: float = 1e-2
    """Adam's rate for Conv4."""
    resnet_lr: float = 1e-2
    """SGD's rate for ResNets; momentum 0.9."""
    decay: float = 5e-4
    """Weight decay of ResNets."""
    clip_norm: float = 50.0
    """Largest gradient norm."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2:
            raise ValueError(f"epochs={self.epochs}, batch={self.batch}: at least 1 and 2 wanted")

    def train(self, model: Functional, residual: bool, data: Data) -> tuple[Params, Tensor]:
        """(parameters and running statistics, accuracy on held-back images) of `model` trained on a task's `x`, `y`.

        `data` also has the order of the images [epochs, n], and `held_x`, `held_y`. Rates fall to a fifth after half,
        two thirds and five sixths of the epochs. The last weights are kept, as in the official code.
        """
        params, running = model.params(), model.running()
        optimiser: Optimiser = SGD(0.9) if residual else Adam()
        state = optimiser.init(params)
        for epoch in range(self.epochs):
            later = sum(epoch >= share * self.epochs for share in (1 / 2, 2 / 3, 5 / 6))
            lr = (self.resnet_lr if residual else self.conv_lr) * 0.2**later
            for rows in torch.split(data["order"][epoch], self.batch):
                if len(rows) < 2:  # no variance
                    continue
                grads, seen = self._gradient(model, params, running, data["x"][rows], data["y"][rows])
                grads = clip_by_norm(grads, self.clip_norm)
                if residual:  # after clipping, as torch's optimisers have it
                    grads = {k: g + self.decay * params[k] for k, g in grads.items()}
                params, state = optimiser.update(params, grads, state, lr)
                running = {k: torch.lerp(v, seen[k], MOMENTUM) for k, v in running.items()}
        return params | running, accuracy(model, params | running, data["held_x"], data["held_y"])

    def _gradient(
        self, model: Functional, params: Params, running: Params, x: Tensor, y: Tensor
    ) -> tuple[Params, Params]:
        def loss(p: Params) -> tuple[Tensor, Params]:
            logits, seen = model.inspect(running | p, x, BATCH)
            return F.cross_entropy(logits, y), seen

        grads, _, seen = differentiate_with(loss, params)
        return grads, seen


def accuracy(model: Functional, params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Share of images whose class is found, with running statistics."""
    with torch.no_grad():
        right: Tensor = model(params, x, FROZEN).argmax(-1) == y
        return right.double().mean()


@dataclass(frozen=True)
class School:
    """Lessons on a fleet: the verb `school` trains one teacher per task. Not an outer step: nothing is descended."""

    models: tuple[Functional, ...]
    residual: tuple[bool, ...]
    schooling: Schooling

    def init(self, meta: Meta) -> Params:
        return {}

    def verbs(self, learner: Learner, objective: Objective) -> Verbs:
        def order(data: Arrays, rng: np.random.Generator) -> Arrays:
            return data | {"order": np.stack([rng.permutation(len(data["x"])) for _ in range(self.schooling.epochs)])}

        def school(at: Params, operand: Params, data: Data) -> Share:
            number = int(data[TEACHER])
            model = self.models[number].to(str(data["x"].device))
            state, right = self.schooling.train(model, self.residual[number], data)
            return Share(state, data["x"].new_ones(()), {"accuracy": right})

        return {"school": Verb(school, order)}

    def step(self, meta: Meta, state: Params, reduce: Reduce) -> tuple[Meta, Params, dict[str, float]]:
        raise NotImplementedError("a school has no outer step")
