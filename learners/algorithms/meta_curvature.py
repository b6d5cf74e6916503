"""Meta-Curvature (Park, Oliva 2019): learn the initialisation, and a preconditioner for the inner gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from learners.base import Meta, Params, check_inner_loop
from learners.engine import tree
from learners.inner import Direction, InnerLoop, partition

CURVATURE = "curvature"


@dataclass(frozen=True)
class MetaCurvature(InnerLoop):
    """φ_{k+1} = φ_k − α C(∇L_S(φ_k)), φ₀ = θ; C is learned with θ and begins as the identity.

    C acts on each tensor by its modes. Fully connected G [out, in]:  M_o G M_i.  Convolution G [out, in, h, w]: a
    matrix over each of out, in and the h·w positions.  Vectors: entry by entry, as in Meta-SGD, which is the case
    of diagonal matrices. Equation 6 of the paper, up to the order of modes, which commute.
    """

    single_loss: ClassVar[bool] = True

    inner_lr: float = 0.01
    """α, the rate of the inner loop."""
    inner_steps: int = 5
    """K, inner steps in meta-training."""
    order: Literal[2, 1] = 2
    """2: differentiate through the inner loop; 1: first-order approximation; C is learned all the same."""
    adapts: tuple[str, ...] = ("*",)
    """Patterns of the parameters that the inner loop moves; the others get no C."""

    def __post_init__(self) -> None:
        check_inner_loop(self.inner_lr, self.inner_steps)

    def init(self, params: Params, rng: np.random.Generator) -> Meta:
        moving, _ = partition(params, self.adapts)
        modes = {f"{name}/{mode}": start for name, v in moving.items() for mode, start in _identity(v).items()}
        return Meta(params | tree.with_prefix(CURVATURE, modes), {})

    def direction(self, meta: Meta) -> Direction:
        modes = tree.under(CURVATURE, meta.params)
        return lambda grads, step: {k: precondition(g, tree.under(k, modes)) for k, g in grads.items()}

    def step_size(self, step: int) -> float:
        return self.inner_lr


def _identity(v: Tensor) -> Params:
    if v.ndim < 2:
        return {"entries": torch.ones_like(v)}
    sizes = {"out": v.shape[0], "in": v.shape[1]} | ({"space": v[0, 0].numel()} if v.ndim > 2 else {})
    return {mode: torch.eye(n, dtype=v.dtype, device=v.device) for mode, n in sizes.items()}


def precondition(g: Tensor, modes: Params) -> Tensor:
    """C(g) for a tensor's `modes`: "entries", or "out", "in" and, for a convolution, "space"."""
    if "entries" in modes:
        return modes["entries"] * g
    first = (modes["out"] @ g.flatten(1)).view(g.shape)  # over out
    second = torch.einsum("oi...,ij->oj...", first, modes["in"])
    if "space" not in modes:
        return second
    return (second.flatten(2) @ modes["space"]).view(g.shape)
