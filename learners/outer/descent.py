"""The outer step of one round: descend the tasks' mean contribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from learners.base import Learner, Meta, Objective, Params, Reduce, Verbs, unpack
from learners.engine import tree
from learners.engine.optimisers import SGD, Adam, Optimiser, Schedule, clip_by_norm, clip_by_value, scheduled


@dataclass(frozen=True)
class Descent:
    """θ ← optimiser(θ, clip(G)) with rate βₜ, G the mean over tasks; slots ← the tasks' mean.

    The mean, as in the MAML code, makes β independent of the meta-batch size (the paper's Algorithm 1 writes a sum).
    Reptile's interpolation θ ← θ + ε · mean(φ − θ) is `optimizer = "sgd"` with lr = ε, its annealing
    `schedule = "linear"`, `final_lr = 0`.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    """Outer optimiser."""
    lr: float = 1e-3
    """β, the outer rate at the first step."""
    schedule: Schedule = "constant"
    """How the rate goes from `lr` to `final_lr`."""
    final_lr: float = 0.0
    """Rate at the end of a linear or cosine schedule."""
    horizon: int = 0
    """Step at which the schedule ends; 0: the run's iterations, fixed when the run begins."""
    beta1: float = 0.9
    """Adam's first decay."""
    beta2: float = 0.999
    """Adam's second decay."""
    eps: float = 1e-8
    """Adam's ε."""
    momentum: float = 0.0
    """SGD's momentum."""
    clip_value: float = 0.0
    """Clip every entry of G into [−clip_value, clip_value]; 0: do not."""
    clip_norm: float = 0.0
    """Scale G down to this norm; 0: do not."""

    def __post_init__(self) -> None:
        for name in ("lr", "final_lr", "horizon", "clip_value", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: 0 or more wanted")

    def init(self, meta: Meta) -> Params:
        optimiser = self._optimiser().init(meta.params)
        return {"step": torch.zeros((), dtype=torch.float64)} | tree.with_prefix("optimizer", optimiser)

    def verbs(self, learner: Learner, objective: Objective) -> Verbs:
        return {}

    def step(self, meta: Meta, state: Params, reduce: Reduce) -> tuple[Meta, Params, dict[str, float]]:
        return self.apply(meta, state, reduce("gradient", None).mean(), 1.0)

    def apply(self, meta: Meta, state: Params, mean: Params, lr_scale: float) -> tuple[Meta, Params, dict[str, float]]:
        grads, slots = unpack(mean)
        metrics = {"outer/grad_norm": float(tree.norm(grads))}
        if self.clip_value:
            grads = clip_by_value(grads, self.clip_value)
        if self.clip_norm:
            grads = clip_by_norm(grads, self.clip_norm)
        step = int(state["step"])
        lr = scheduled(self.schedule, self.lr, self.final_lr, step, self.horizon)
        params, optimiser = self._optimiser().update(meta.params, grads, tree.under("optimizer", state), lr * lr_scale)
        state = {"step": state["step"] + 1} | tree.with_prefix("optimizer", optimiser)
        return Meta(params, slots), state, metrics | {"outer/lr": lr * lr_scale}

    def _optimiser(self) -> Optimiser:
        match self.optimizer:
            case "adam":
                return Adam(self.beta1, self.beta2, self.eps)
            case "sgd":
                return SGD(self.momentum)
