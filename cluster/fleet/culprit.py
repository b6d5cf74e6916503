"""What was not finite first, where a sum over tasks is not: θ, a task's data, a loss, or a gradient alone."""

from __future__ import annotations

import torch

from learners.base import Data, Params, Sum

LIVED = ("observations", "actions", "rewards")
"""Arrays [inner step, time step, …] of an RL task that all its others follow from, in the order they come about."""


def culprit(theta: Params, data: Data, result: Sum, first: int) -> str:
    """What was not finite first, "data, query_x of task 3" and the like, for a sum over stacked tasks of which the
    first has number `first`, at `theta`.
    """
    for name in _broken(theta):
        return f"θ, {name}"
    lived = {name: data[name] for name in LIVED if name in data}
    broken = _broken(lived or data)
    if broken:  # of what was lived through, the earliest step; else the first array
        name = min(broken, key=lambda n: broken[n][:3]) if lived else next(iter(broken))
        kind, (task, *place) = "policy" if name == "actions" else "data", broken[name]
        return f"{kind}, {name} of task {first + task}" + (f" at {place}" if place else "")
    for name, (task, *_) in _broken({k: v for k, v in result.rows.items() if "loss" in k}).items():
        return f"loss, {name} of task {first + task}, whose data are finite"
    for name in _broken(result.total):
        return f"gradient, {name.removeprefix('params/')}, while data and losses are finite"
    return ""


def _broken(values: Params) -> dict[str, list[int]]:
    """Where the first number stands that is none, of the tensors that hold such."""
    wrong = {name: ~torch.isfinite(v) for name, v in values.items() if v.is_floating_point()}
    return {name: there.nonzero()[0].tolist() for name, there in wrong.items() if there.any()}
