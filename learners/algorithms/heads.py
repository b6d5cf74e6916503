"""Linear heads made from the features of a support set: what prototypes and probes have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from learners.base import Data, Meta, Objective, Params
from learners.objectives.attack import SupportAttacked
from learners.objectives.supervised import Supervised

HEAD = ("head*",)
WEIGHT, BIAS = "head.weight", "head.bias"

ABSENT = -1e30
"""Bias of a class that the support set does not show: its probability is exactly 0, and nothing is infinite (a query of
it costs 1e30, where ∞ would make a mean over tasks no number)."""


def supervised(objective: Objective) -> Supervised:
    """The objective, if it is of examples with targets. Raises ValueError otherwise."""
    if not isinstance(objective, Supervised):
        raise ValueError(f"a head is fitted to examples with targets: {type(objective).__name__} has none")
    return objective


def classifies(objective: Supervised) -> bool:
    """Whether targets are one class each."""
    return objective.classifies


def classes(params: Params) -> int:
    """Outputs of the head. Raises ValueError for a head without a bias."""
    if BIAS not in params:
        raise ValueError(
            f"a linear last layer named head, with a bias, is wanted here; parameters: {', '.join(params)}"
        )
    return len(params[BIAS])


def features(objective: Supervised, params: Params, data: Data) -> Tensor:
    """What reaches the head for the support set, normalised by itself: [n, d]."""
    return objective.features(params, data)


def membership(data: Data, like: Tensor, classes: int) -> Tensor:
    """[n, classes]: 1 where a support example is of the class, and real (`support_mask`), in the dtype of `like`."""
    labels = torch.arange(classes, device=like.device)
    member = (data["support_y"][:, None] == labels).to(like.dtype)
    return member * data["support_mask"].to(like.dtype)[:, None] if "support_mask" in data else member


def prototypes(z: Tensor, member: Tensor) -> Tensor:
    """Mean features p_c [classes, d] of features [n, d]; 0 for a class without examples."""
    return member.t() @ z / member.sum(0).clamp(min=1)[:, None]


def barred(bias: Tensor, member: Tensor) -> Tensor:
    """Biases [classes], with those of classes without examples at ABSENT."""
    return torch.where(member.sum(0) > 0, bias, ABSENT)


def prototypical(meta: Meta, objective: Objective, data: Data) -> Params:
    """θ with the head w_c = 2 p_c, b_c = −‖p_c‖², which can be differentiated with respect to θ.

    An attacked support set is attacked against the prototypes of the clean one: θ's own head is never used.
    """
    if isinstance(objective, SupportAttacked):
        clean = prototypical(meta, objective.objective, data)
        data, objective = objective.attacked(meta.slots | clean, data, 0), objective.objective
    if not isinstance(objective, Supervised) or not classifies(objective):
        raise ValueError("prototypes are of classes: a classification task wanted")
    z = features(objective, meta.slots | meta.params, data)
    member = membership(data, z, classes(meta.params))
    p = prototypes(z, member)
    return meta.params | {WEIGHT: 2 * p, BIAS: barred(-p.square().sum(1), member)}
