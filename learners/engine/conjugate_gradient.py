"""Conjugate gradient over dictionaries of tensors: the solver of implicit gradients and trust regions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from learners.base import Params
from learners.engine import tree


def conjugate_gradient(product: Callable[[Params], Params], b: Params, steps: int) -> tuple[Params, Params]:
    """(x, b − A x) after `steps` steps towards A x = b, A symmetric positive definite, given as v ↦ A v.

    Exact after as many steps as A has distinct eigenvalues; from there on nothing moves (Hestenes & Stiefel 1952).
    Where A is not positive along a direction, x stays as it is from there on; where it is not along b itself, x = b,
    the direction of steepest descent (Nocedal & Wright 2006, Algorithm 7.1).
    """
    x, r, p = tree.zeros_like(b), b, b
    rr = tree.dot(r, r)
    going = torch.ones_like(rr, dtype=torch.bool)
    for k in range(steps):
        ap = product(p)
        curvature = tree.dot(p, ap)
        going = going & (curvature > 0)
        step = torch.where(going, rr / curvature, 0.0 if k else 1.0)
        x, r = tree.add(x, tree.scale(step, p)), tree.sub(r, tree.scale(step, ap))
        before, rr = rr, tree.dot(r, r)
        p = tree.add(r, tree.scale(torch.where(before > 0, rr / before, 0.0), p))
    return x, r
