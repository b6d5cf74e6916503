"""The arrays of a supervised task: nested, padded, of several inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from learners.base import Data
from learners.engine import tree
from learners.modules.functional import Inputs
from learners.objectives.measures import Measure, one_tensor


def given(data: Data, name: str) -> Any:
    """An array of a task, or a dictionary of those under `name/`. Raises ValueError where there is neither."""
    if name in data:
        return data[name]
    parts = tree.under(name, data)
    if not parts:
        raise ValueError(f"a task with {name} is wanted here, this one has {', '.join(data)}")
    return parts


def shots(output: Any, data: Data) -> float | Tensor:
    """Examples per way of a support set, those that are there: the mean over the ways."""
    known, there = data.get("support_mask"), data.get("class_mask")
    size = len(tree.leaves(given(data, "support_x"))[0]) if known is None else known.sum()
    return size / (one_tensor(output, "scale='sum_over_shots'").shape[1] if there is None else there.sum())


def holds(data: Data, name: str) -> bool:
    """Whether a task has an array of this name, or some under it."""
    return name in data or bool(tree.under(name, data))


def and_more(mask: Tensor | None, count: int) -> Tensor | None:
    """A support set's mask with `count` examples more, which are there."""
    return None if mask is None else torch.cat([mask, mask.new_ones(count)])


def rows_of(x: Inputs, start: int, stop: int) -> Inputs:
    """Examples start ≤ i < stop."""
    part: Inputs = tree.mapped(lambda v: v[start:stop], x)
    return part


def joined(a: Inputs, b: Inputs, axis: int = 0) -> Inputs:
    """Inputs of two sets, concatenated."""
    if isinstance(a, dict) and isinstance(b, dict):
        return {k: torch.cat([v, b[k]], axis) for k, v in a.items()}
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return torch.cat([a, b], axis)


def of_classes(output: Any, data: Data, criterion: Measure) -> Any:
    """Outputs with those of classes that the task has not at −∞."""
    if "class_mask" not in data:
        return output
    absent = ~data["class_mask"].bool()
    if getattr(criterion, "label_smoothing", 0):
        raise ValueError("label_smoothing is over all classes, and a task's class_mask leaves some out: 0 wanted")
    if not isinstance(output, Tensor) or output.shape[1] != len(absent):
        seen = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"a class_mask of {len(absent)} classes does not fit outputs {seen}: [n, classes, …] wanted")
    return output.masked_fill(absent.view(1, -1, *(1 for _ in output.shape[2:])), -torch.inf)


def check_probabilities(name: str, targets: Any) -> None:
    """Raise ValueError for rows of numbers that do not add up to 1."""
    if targets is None or targets.dtype.kind != "f" or targets.ndim < 2:
        return
    sums = targets.sum(1)
    if not np.allclose(sums, 1, atol=1e-3):
        raise ValueError(
            f"{name} holds rows that add up to {float(sums.flat[np.abs(sums - 1).argmax()]):g}: cross_entropy wants "
            "labels, or probabilities that add up to 1; binary_cross_entropy is for several labels at a time"
        )
