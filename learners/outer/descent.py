"""The outer step of one round: descend the tasks' mean contribution."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, NamedTuple

import torch

from learners.base import AVERAGED, Learner, Meta, Objective, Params, Reduce, Verbs, unpack
from learners.engine import tree
from learners.engine.optimisers import SGD, Adam, Optimiser, Schedule, clip_by_norm, clip_by_value, scheduled


@dataclass(frozen=True)
class Group:
    """Parameters that descend at a rate, or with a decay, of their own.

    Patterns are those of `learner.adapts`, and like them speak of the model's parameters: what a learner learns beside
    these (`alpha/…`, `rate/…`) is matched only by a pattern with a /.
    """

    match: str
    """Pattern of their names (`head.*`)."""
    lr: float = -1.0
    """Their rate where the others' is `outer.lr`, and scheduled alike; 0: they stay, and have no part in the norm that
    is clipped; −1: the others'."""
    weight_decay: float = -1.0
    """Their decay; −1: the others'."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if value < 0 and value != -1:
                raise ValueError(f"{name}={value}: 0 or more wanted, or -1 for that of the other parameters")

    def matches(self, name: str) -> bool:
        """Whether this is about a parameter."""
        return fnmatchcase(name, self.match) and ("/" in self.match or "/" not in name)


class _Part(NamedTuple):
    """Parameters with one rate and one decay."""

    names: list[str]
    lr: float
    decay: float


@dataclass(frozen=True)
class Descent:
    """θ ← optimiser(θ, clip(G)) with rate βₜ, G the mean over tasks; slots ← the tasks' mean.

    The mean, as in the MAML code, makes β independent of the meta-batch size (the paper's Algorithm 1 writes a sum).
    Reptile's interpolation θ ← θ + ε · mean(φ − θ) is `optimizer = "sgd"` with lr = ε, its annealing
    `schedule = "linear"`, `final_lr = 0`.

    Weight decay λ is L2 regularisation, G + λθ, for "sgd" and "adam", and θ ← (1 − βₜλ) θ beside the step for "adamw"
    (Loshchilov & Hutter 2019), as in torch; what a learner learns beside the model's parameters (rates) does not decay.
    """

    LATER: ClassVar = ("nesterov", "weight_decay", "ema", "groups")
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
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
    nesterov: bool = False
    """SGD's momentum looks ahead."""
    weight_decay: float = 0.0
    """λ."""
    clip_value: float = 0.0
    """Clip every entry of G into [−clip_value, clip_value]; 0: do not."""
    clip_norm: float = 0.0
    """Scale G down to this norm; 0: do not."""
    ema: float = 0.0
    """d of a running mean θ̄ ← d θ̄ + (1 − d) θ from θ₀ on, which evaluation, the best checkpoint and export take in
    the place of θ; the first steps count for more, d = (1 + t)/(10 + t). 0: none."""
    groups: tuple[Group, ...] = ()
    """Parameters with rates or decays of their own, as tables [[outer.groups]]; the first that matches counts."""

    def __post_init__(self) -> None:
        for name in ("lr", "final_lr", "horizon", "weight_decay", "clip_value", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: 0 or more wanted")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema}: 0 or more, and less than 1, wanted")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov without momentum: momentum > 0 wanted")

    def init(self, meta: Meta) -> Params:
        self._check_groups(meta.params)
        optimiser = self._optimiser().init(meta.params)
        state = {"step": torch.zeros((), dtype=torch.float64)} | tree.with_prefix("optimizer", optimiser)
        return state | tree.with_prefix(AVERAGED, meta.params) if self.ema else state

    def verbs(self, learner: Learner, objective: Objective) -> Verbs:
        return {}

    def step(self, meta: Meta, state: Params, reduce: Reduce) -> tuple[Meta, Params, dict[str, float]]:
        return self.apply(meta, state, reduce("gradient", None).mean(), 1.0)

    def apply(self, meta: Meta, state: Params, mean: Params, lr_scale: float) -> tuple[Meta, Params, dict[str, float]]:
        grads, slots = unpack(mean)
        metrics = {"outer/grad_norm": float(tree.norm(grads))}
        grads = {k: torch.zeros_like(g) if self._stays(k) else g for k, g in grads.items()}
        if self.clip_value:
            grads = clip_by_value(grads, self.clip_value)
        if self.clip_norm:
            grads = clip_by_norm(grads, self.clip_norm)
        step, moments = int(state["step"]), tree.under("optimizer", state)
        params, after = meta.params, moments
        for part in self._parts(meta.params):
            lr = 0.0 if self._stays(part.names[0]) else self._rate(part.lr, step) * lr_scale
            moved, kept = self._moved(part, meta.params, grads, moments, lr)
            params, after = params | moved, after | kept
        now = {"step": state["step"] + 1} | tree.with_prefix("optimizer", after)
        if self.ema:
            d = min(self.ema, (1 + step) / (10 + step))
            now |= {f"{AVERAGED}/{k}": torch.lerp(p, state[f"{AVERAGED}/{k}"], d) for k, p in params.items()}
        return Meta(params, slots), now, metrics | {"outer/lr": self._rate(self.lr, step) * lr_scale}

    def _rate(self, first: float, step: int) -> float:
        """The rate of a step, of parameters that begin with `first`: the others' in proportion."""
        final = self.final_lr * (first / self.lr if self.lr else 1.0)  # this order: their own are not rounded
        return scheduled(self.schedule, first, final, step, self.horizon)

    def _moved(
        self, part: _Part, params: Params, grads: Params, moments: Params, lr: float
    ) -> tuple[Params, Params]:  # fmt: skip
        """The parameters of a part, and the moments that changed."""
        theta, slope = {k: params[k] for k in part.names}, {k: grads[k] for k in part.names}
        if part.decay and self.optimizer == "adamw":
            theta = {k: p if "/" in k else p * (1 - lr * part.decay) for k, p in theta.items()}
        elif part.decay:
            slope = {k: g if "/" in k else g + part.decay * theta[k] for k, g in slope.items()}
        own = {k: v for k, v in moments.items() if k.partition("/")[2] in theta or "/" not in k}
        return self._optimiser().update(theta, slope, own, lr)

    def _parts(self, params: Params) -> list[_Part]:
        """The parameters by group."""
        parts = [
            _Part([], self.lr if g.lr < 0 else g.lr, self.weight_decay if g.weight_decay < 0 else g.weight_decay)
            for g in self.groups
        ] + [_Part([], self.lr, self.weight_decay)]
        for name in params:
            parts[self._group(name)].names.append(name)
        return [part for part in parts if part.names]

    def _group(self, name: str) -> int:
        """Number of the first group that matches; how many there are, where none does."""
        return next((i for i, g in enumerate(self.groups) if g.matches(name)), len(self.groups))

    def _stays(self, name: str) -> bool:
        """Whether a parameter is in a group that does not move."""
        number = self._group(name)
        return number < len(self.groups) and self.groups[number].lr == 0

    def _check_groups(self, params: Params) -> None:
        """Raise ValueError for a group that no parameter is in."""
        meant = {self._group(name) for name in params}
        for number, group in enumerate(self.groups):
            if not any(map(group.matches, params)):
                near = ", ".join(get_close_matches(group.match, list(params), 1, 0.0))
                raise ValueError(f"groups: match={group.match!r} matches none of the parameters; did you mean {near}?")
            if number not in meant:
                raise ValueError(
                    f"groups: match={group.match!r} matches only what groups before it do, and the first that matches "
                    "counts"
                )

    def _optimiser(self) -> Optimiser:
        match self.optimizer:
            case "adam" | "adamw":
                return Adam(self.beta1, self.beta2, self.eps)
            case "sgd":
                return SGD(self.momentum, self.nesterov)
