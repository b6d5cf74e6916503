"""Optimisers as init/update pairs, clipping and schedules. The inner and the outer loop use the same ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from learners.base import Params
from learners.engine import tree
from learners.engine.derivative import root

Schedule = Literal["constant", "linear", "cosine"]


class Optimiser(Protocol):
    """A pair of pure functions; differentiable in parameters, gradients and rate."""

    def init(self, params: Params) -> Params:
        """State before the first update."""

    def update(self, params: Params, grads: Params, state: Params, lr: float) -> tuple[Params, Params]:
        """The next parameters and state."""


@dataclass(frozen=True)
class SGD:
    """v ← μ v + g;  θ ← θ − lr · v, or with Nesterov's look ahead θ ← θ − lr · (g + μ v). Without momentum (μ = 0)
    there is no state.
    """

    momentum: float = 0.0
    nesterov: bool = False

    def init(self, params: Params) -> Params:
        return tree.with_prefix("v", tree.zeros_like(params)) if self.momentum else {}

    def update(self, params: Params, grads: Params, state: Params, lr: float) -> tuple[Params, Params]:
        if not self.momentum:
            return {k: p - lr * grads[k] for k, p in params.items()}, {}
        v = {k: self.momentum * old + grads[k] for k, old in tree.under("v", state).items()}
        step = {k: grads[k] + self.momentum * v[k] for k in v} if self.nesterov else v
        return {k: p - lr * step[k] for k, p in params.items()}, tree.with_prefix("v", v)


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015); `style` says where ε stands.

    torch:  θ ← θ − lr · m̂ / (√v̂ + ε);    tf1:  θ ← θ − lr · √(1−β₂ᵗ)/(1−β₁ᵗ) · m / (√v + ε)
    The two agree but for ε: at t = 1 TensorFlow 1's is ε/√(1−β₂) in torch's terms.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    style: Literal["torch", "tf1"] = "torch"

    def init(self, params: Params) -> Params:
        zeros = tree.zeros_like(params)
        first = next(iter(params.values()))
        m = tree.with_prefix("m", zeros) if self.beta1 else {}
        return (
            m
            | tree.with_prefix("v", tree.zeros_like(params))
            | {"t": torch.zeros((), dtype=first.dtype, device=first.device)}
        )

    def update(self, params: Params, grads: Params, state: Params, lr: float) -> tuple[Params, Params]:
        t = state["t"] + 1
        v = {
            k: torch.addcmul(self.beta2 * old, grads[k], grads[k], value=1 - self.beta2)
            for k, old in tree.under("v", state).items()
        }
        m = {k: self.beta1 * old + (1 - self.beta1) * grads[k] for k, old in tree.under("m", state).items()} or grads
        new = {k: p - lr * self._direction(m[k], v[k], t) for k, p in params.items()}
        kept = tree.with_prefix("m", m) if self.beta1 else {}
        return new, kept | tree.with_prefix("v", v) | {"t": t}

    def _direction(self, m: Tensor, v: Tensor, t: Tensor) -> Tensor:
        second = 1 - self.beta2**t
        m = m / (1 - self.beta1**t) if self.beta1 else m
        if self.style == "torch":
            return m / (root(v / second) + self.eps)
        return second.sqrt() * m / (root(v) + self.eps)


def clip_by_value(grads: Params, limit: float) -> Params:
    """Every entry into [−limit, limit] (cbfinn's MiniImagenet runs: 10)."""
    return tree.apply(lambda g: g.clamp(-limit, limit), grads)


def clip_by_norm(grads: Params, limit: float) -> Params:
    """grads · min(1, limit / ‖grads‖₂)."""
    return tree.scale((limit / tree.norm(grads).clamp_min(1e-12)).clamp(max=1.0), grads)


def scheduled(schedule: Schedule, first: float, final: float, step: int, horizon: int) -> float:
    """The rate of step number `step` = 0, 1, …; constant, or from `first` towards `final`, reached at `horizon`.

    linear: first + (final − first) · step/horizon (Reptile: 1 → 0);  cosine: final + (first − final)(1 + cos πp)/2.
    """
    progress = min(step / horizon, 1.0) if horizon else 0.0
    if schedule == "linear":
        return first + (final - first) * progress
    if schedule == "cosine":
        return final + (first - final) * (1 + math.cos(math.pi * progress)) / 2
    return first
