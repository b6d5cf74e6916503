"""What was not finite first, where a sum over tasks is not: θ, a task's data, a loss, or a gradient alone."""

from __future__ import annotations

import torch
from torch import Tensor

from learners.base import Data, Params, Sum

LIVED = ("observations", "actions", "rewards")
"""Arrays [inner step, time step, …] of an RL task that all its others follow from, in the order they come about."""


def culprit(theta: Params, data: Data, result: Sum, first: int) -> str:
    """What was not finite first, "data, query_x of task 3" and the like, for a sum over stacked tasks of which the
    first has number `first`, at `theta`.
    """
    for name, value in theta.items():
        if not _finite(value):
            return f"θ, {name}"
    found = _first(data)
    if found:
        name, (task, *place) = found
        kind = "policy" if name == "actions" else "data"
        return f"{kind}, {name} of task {first + task}" + (f" at {place}" if place else "")
    for name, value in result.rows.items():
        if "loss" in name and not _finite(value):
            task = int((~torch.isfinite(value)).nonzero()[0, 0])
            return f"loss, {name} of task {first + task}, whose data are finite"
    for name, value in result.total.items():
        if not _finite(value):
            return f"gradient, {name.removeprefix('params/')}, while data and losses are finite"
    return ""


def _first(data: Data) -> tuple[str, list[int]] | None:
    """Name and place of the first number that is none: of the earliest step, where a task was lived through."""
    lived = [name for name in LIVED if name in data]
    places = {
        name: (~torch.isfinite(data[name])).nonzero()[0].tolist() for name in lived or data if not _finite(data[name])
    }
    if not places:
        return None
    name = min(places, key=lambda n: places[n][:3]) if lived else next(iter(places))
    return name, places[name]


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())
