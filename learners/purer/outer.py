"""PURER's meta-iteration over a fleet: invert per teacher, learn from pseudo-episodes, make them harder once they are
mastered.

Hu, Shen, Wang, Liu, Tao, Yuan: Architecture, Dataset and Model-Scale Agnostic Data-free Meta-Learning, CVPR 2023. Where
the official code and the paper part, docstrings say which one this follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from envs.base import ADVERSARY, TEACHER, TEACHERS
from learners.algorithms.maml import MAML
from learners.base import (
    CARRIED,
    Data,
    Learner,
    Meta,
    Metrics,
    Objective,
    Params,
    Reduce,
    Share,
    Verb,
    Verbs,
    pack,
    unpack,
)
from learners.engine import tree
from learners.engine.derivative import differentiate, differentiate_with
from learners.engine.optimisers import Adam
from learners.inner import InnerLoop, single_loss
from learners.outer.descent import Descent
from learners.purer.curriculum import Switch
from learners.purer.inversion import Inversion
from learners.purer.objective import DataFree, episode


@dataclass(frozen=True)
class Purer:
    """min over θ, max over D (when the switch fires) of the outer loss on episodes of D, D kept plausible by L_EI.

    A meta-iteration is: one Adam step on D by Σ_i ∇L_EI of teacher i, each on its own slice, minus λ ∇_D L_outer of one
    fresh episode if the switch fired, differentiated through the inner loop into support and query images; then one
    Adam step on θ by the mean over pseudo-episodes of D. D begins as N(0, 1) noise. The driver owns D and its moments;
    workers are sent D and answer with gradients, so a lost worker costs time only.

    Each teacher has weight 1 (the official code weighs teacher i of n by n − i, by adding up inside its loop).
    """

    lr: float = 1e-3
    """Adam's rate for θ."""
    inversion: Inversion = field(default_factory=Inversion)
    """What makes images plausible, and how fast they follow."""
    switch: Switch = field(default_factory=Switch)
    """When episodes become harder."""
    strength: float = 10.0
    """λ, weight of the reversed outer loss."""
    teachers: int = 0
    """How many there are; 0: as the task says when the run begins."""
    start: Literal["random", "average", "best"] = "random"
    """θ₀: the model's initialisation, the mean of all teachers of its architecture, or the most accurate of them with a
    fresh head."""

    def __post_init__(self) -> None:
        if min(self.lr, self.strength, self.teachers) < 0:
            raise ValueError(f"lr={self.lr}, strength={self.strength}, teachers={self.teachers}: 0 or more wanted")

    def init(self, meta: Meta) -> Params:
        zero = torch.zeros((), dtype=torch.float64)
        return (
            {"step": zero, "on": zero.clone()}
            | tree.with_prefix("theta", self._descent.init(meta))
            | tree.with_prefix("switch", self.switch.init())
        )

    def verbs(self, learner: Learner, objective: Objective) -> Verbs:
        if not isinstance(objective, DataFree):
            raise ValueError("the outer step of PURER wants a data-free task: --task.name data_free")
        if not single_loss(learner):
            raise ValueError(
                f"the outer step of PURER wants MAML, ANIL or a prototypical network, not {type(learner).__name__}"
            )
        return {
            "noise": Verb(_noise, lambda data, rng: data | {"noise": _standard_normal(objective, rng)}, light=True),
            "invert": Verb(_invert(objective, self.inversion), lambda data,
            rng: data | {"shift": _shift(self.inversion.jitter, rng)}), "episodes": Verb(_episodes(learner, objective)),
            "adversary": Verb(_adversary(learner, objective)),
        }  # fmt: skip

    def step(self, meta: Meta, state: Params, reduce: Reduce) -> tuple[Meta, Params, dict[str, float]]:
        iteration, fired = int(state["step"]), bool(state["on"])
        state, inverted = self._move_images(state, reduce, fired)
        learned = reduce("episodes", {"images": state["images"]})
        meta, theta, metrics = self._descent.apply(meta, tree.under("theta", state), learned.mean(), 1.0)
        accuracy, losses = float(learned.rows["query_accuracy"].mean()), float(learned.rows["query_loss"].sum())
        switch, fires = self.switch.update(tree.under("switch", state), iteration, accuracy, losses)
        state |= {"step": state["step"] + 1, "on": torch.tensor(float(fires), dtype=torch.float64)}
        state |= tree.with_prefix("theta", theta) | tree.with_prefix("switch", switch)
        return meta, state, metrics | inverted | {"purer/fired": float(fired), "purer/difficulty": 1 - accuracy}

    def shown(self, state: Params) -> Params:
        """D, a picture of [images, c, h, w] for each teacher: one image of every class."""
        if "images" not in state:
            return {}
        return {f"teacher_{i}": images[:, 0] for i, images in enumerate(state["images"])}

    def _move_images(self, state: Params, reduce: Reduce, fired: bool) -> tuple[Params, dict[str, float]]:
        """One step on D, and scalars to log."""
        adam = Adam()
        if "images" not in state:
            images = reduce("noise", None, over=(TEACHERS, self.teachers)).rows[CARRIED + "images"]
            state = state | {"images": images} | tree.with_prefix("adam", adam.init({"images": images}))
        images = state["images"]
        found = reduce("invert", {"images": images}, over=(TEACHERS, self.teachers))
        gradient = found.rows[CARRIED + "gradient"]
        if fired:
            hard = reduce("adversary", {"images": images}, over=(ADVERSARY, 1)).rows
            flat = gradient.flatten(0, 2)
            flat = flat.index_add(0, hard[CARRIED + "which"][0], hard[CARRIED + "gradient"][0], alpha=-self.strength)
            gradient = flat.view_as(images)
        moved, moments = adam.update(
            {"images": images}, {"images": gradient}, tree.under("adam", state), self.inversion.lr
        )
        metrics = {f"purer/{k}": float(v.mean()) for k, v in found.rows.items() if k.startswith("inversion")}
        return state | moved | tree.with_prefix("adam", moments), metrics

    @property
    def _descent(self) -> Descent:
        return Descent(lr=self.lr)


def _standard_normal(objective: DataFree, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float64]]:
    return rng.standard_normal((objective.teachers[0].ways, objective.per_class, *objective.shape))


def _shift(jitter: int, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
    return rng.integers(-jitter, jitter + 1, 2)


def _noise(at: Params, operand: Params, data: Data) -> Share:
    return Share({}, data["noise"].new_ones(()), {CARRIED + "images": data["noise"]})


def _invert(objective: DataFree, inversion: Inversion) -> Callable[[Params, Params, Data], Share]:
    def invert(at: Params, operand: Params, data: Data) -> Share:
        """∇ L_EI with respect to one teacher's slice of D."""
        number = int(data[TEACHER])
        teacher, images = objective.teachers[number], operand["images"][number]  # [ways, per class, c, h, w]
        labels = torch.arange(teacher.ways, device=images.device).repeat_interleave(images.shape[1])
        grads, loss, terms = differentiate_with(
            lambda p: inversion.loss(teacher, p["x"].flatten(0, 1), labels, data["shift"]), {"x": images}
        )
        logged = {f"inversion_{k}": v for k, v in terms.items()} | {"inversion_loss": loss}
        return Share({}, images.new_ones(()), {CARRIED + "gradient": grads["x"]} | logged)

    return invert


def _outer_loss(learner: InnerLoop, objective: DataFree, meta: Meta, data: Data) -> tuple[Tensor, Metrics]:
    """L_Q(φ_K) of an episode, and how often it is right."""
    phi = meta.slots | learner.adapt(meta, objective, data, learner.inner_steps)
    logits, y = objective.predict(phi, data, data["query_x"]), data["query_y"]
    loss = objective.query_loss(logits, data)
    return loss, {"query_accuracy": (logits.argmax(-1) == y).to(loss.dtype).mean(), "query_loss": loss.detach()}


def _episodes(learner: InnerLoop, objective: DataFree) -> Callable[[Params, Params, Data], Share]:
    def episodes(at: Params, operand: Params, data: Data) -> Share:
        """The learner's contribution from one pseudo-episode; D is a constant."""
        meta, task = unpack(at), episode(operand["images"], data)
        grads, loss, metrics = differentiate_with(
            lambda p: _outer_loss(learner, objective, Meta(p, meta.slots), task), meta.params
        )
        return Share(
            pack(grads, learner.slots(meta, objective, task)),
            loss.new_ones(()),
            metrics | {"grad_norm": tree.norm(grads)},
        )

    return episodes


def _adversary(learner: InnerLoop, objective: DataFree) -> Callable[[Params, Params, Data], Share]:
    if isinstance(learner, MAML):
        learner = replace(learner, order=2)

    def adversary(at: Params, operand: Params, data: Data) -> Share:
        """∇ L_outer with respect to an episode's images, through the inner loop (second order whatever the learner); θ
        is a constant.
        """
        task, meta = episode(operand["images"], data), unpack(at)
        moving = {k: task[k] for k in ("support_x", "query_x")}
        grads, _ = differentiate(lambda x: _outer_loss(learner, objective, meta, task | x)[0], moving, False)
        which = torch.cat([data["support_rows"].flatten(), data["query_rows"].flatten()])
        both = torch.cat([grads["support_x"], grads["query_x"]])
        return Share({}, both.new_ones(()), {CARRIED + "which": which, CARRIED + "gradient": both})

    return adversary
