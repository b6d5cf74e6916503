"""Inversion calibration following the inner loop (ICFIL, PURER §3.4): at test, adapted models look again at what they
believe.

No code of it was ever published, and its constants are in no text that we could read: τ, steps, rates, the number of
images and the absence of a projection head are our decisions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from envs.base import Arrays
from learners.algorithms.maml import MAML
from learners.base import Data, Learner, Meta, Objective, Params
from learners.engine import tree
from learners.engine.derivative import differentiate
from learners.engine.optimisers import Adam
from learners.inner import partition
from learners.objectives.supervised import Supervised
from learners.purer.inversion import norm, total_variation

HEAD = ("head*",)


@dataclass(frozen=True)
class Calibration:
    """After the inner loop on a real support set S: invert images Ŝ from the adapted model ψ = (f, h), draw each real
    image towards the inverted ones of its class and away from the others (f), and fit the head to both (h).
    """

    kind: Literal["off", "contrastive", "contrastive+head"] = "contrastive+head"
    """What is calibrated."""
    per_class: int = 5
    """Inverted images per class."""
    inversion_steps: int = 100
    """Steps of Adam on the images."""
    inversion_lr: float = 0.25
    """Its rate."""
    tv: float = 1e-4
    """Weight of total variation of the images."""
    l2: float = 1e-5
    """Weight of their norm."""
    temperature: float = 0.1
    """τ of the contrastive loss."""
    steps: int = 10
    """Steps of gradient descent on f and h."""

    def __post_init__(self) -> None:
        if self.per_class < 1 or min(self.inversion_steps, self.steps) < 0 or self.temperature <= 0:
            raise ValueError(f"{self}: per_class of at least 1, steps of 0 or more and a positive temperature wanted")

    def __call__(self, objective: Supervised, slots: Params, params: Params, data: Data, lr: float) -> Params:
        """ψ after calibration, from ψ = `params` after the inner loop; `slots` are constants of the model, `data` has
        the support set and the `noise` that Ŝ begins from.
        """
        statistics = objective.own()
        ways = len(data["noise"]) // self.per_class
        labels = torch.arange(ways, device=data["noise"].device).repeat_interleave(self.per_class)
        images = self._inverted(objective, slots | params, data["noise"], labels)
        body, head = partition(params, HEAD)[::-1]
        both_x, both_y = torch.cat([data["support_x"], images]), torch.cat([data["support_y"], labels])

        def contrast(f: Params) -> Tensor:
            z = objective.model.features(slots | head | f, both_x, statistics)
            real = len(data["support_x"])
            return contrastive(z[:real], data["support_y"], z[real:], labels, self.temperature)

        def fit(h: Params) -> Tensor:
            return F.cross_entropy(objective.model(slots | body | h, both_x, statistics), both_y)

        for _ in range(self.steps):
            pulled = differentiate(contrast, body, False)[0]
            fitted = differentiate(fit, head, False)[0] if self.kind == "contrastive+head" else tree.zeros_like(head)
            body, head = tree.sub(body, tree.scale(lr, pulled)), tree.sub(head, tree.scale(lr, fitted))
        return {k: (body | head)[k] for k in params}

    def _inverted(self, objective: Supervised, params: Params, noise: Tensor, labels: Tensor) -> Tensor:
        def loss(p: Params) -> Tensor:
            x = p["x"]
            return (
                F.cross_entropy(objective.model(params, x, objective.own()), labels)
                + self.tv * total_variation(x)
                + self.l2 * norm(x)
            )

        adam, images = Adam(), {"x": noise}
        state = adam.init(images)
        for _ in range(self.inversion_steps):
            images, state = adam.update(images, differentiate(loss, images, False)[0], state, self.inversion_lr)
        return images["x"]


def contrastive(real: Tensor, real_y: Tensor, inverted: Tensor, inverted_y: Tensor, temperature: float) -> Tensor:
    """Mean over real x, and over its positives p, of −log[ e^{z·p/τ} / (e^{z·p/τ} + Σ_n e^{z·n/τ}) ], z normalised.

    Positives and negatives are the inverted images of the same and of other labels. Features [r, d] and [i, d], labels
    [r] and [i]. (Supervised contrastive loss, Khosla et al. 2020, between two sets.)
    """
    similarity = F.normalize(real, dim=1) @ F.normalize(inverted, dim=1).t() / temperature  # [r, i]
    positive = real_y[:, None] == inverted_y[None, :]
    negatives = similarity.masked_fill(positive, -torch.inf).logsumexp(1, keepdim=True)
    each = torch.logaddexp(similarity, negatives) - similarity
    return (torch.where(positive, each, 0.0).sum(1) / positive.sum(1)).mean()


@dataclass(frozen=True)
class DataFreeMAML(MAML):
    """MAML (or, by what `adapts`, ANIL) whose inner loop at meta-test is followed by calibration: the learner of
    PURER.
    """

    calibration: Calibration = field(default_factory=Calibration)
    """At meta-test, after the last inner step."""

    def at_test(self) -> Learner:
        return (
            self
            if self.calibration.kind == "off"
            else Calibrated(**{k: getattr(self, k) for k in (f.name for f in fields(self))})
        )


@dataclass(frozen=True)
class Calibrated(DataFreeMAML):
    """The same at meta-test."""

    def draw(self, data: Arrays, rng: np.random.Generator, steps: int) -> Arrays:
        data = super().draw(data, rng, steps)
        ways = int(data["support_y"].max()) + 1
        noise = rng.standard_normal((ways * self.calibration.per_class, *data["support_x"].shape[1:]))
        return data | {"noise": noise.astype(np.float32)}

    def path(self, meta: Meta, objective: Objective, data: Data, steps: int) -> Iterator[Params]:
        assert isinstance(objective, Supervised)
        for k, params in enumerate(super().path(meta, objective, data, steps)):
            yield params if k < steps else self.calibration(objective, meta.slots, params, data, self.inner_lr)

    def at_test(self) -> Learner:
        return self
