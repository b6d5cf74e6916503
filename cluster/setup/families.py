"""What a family of tasks says of itself; for one that only has `sample`, what its first training task shows."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np

from cluster.fleet import seeds
from envs.base import Array, TaskDistribution

Kind: TypeAlias = Literal["regression", "classification", "control"]


def kind(tasks: TaskDistribution) -> Kind:
    """What the targets are: by dtype, integers being classes."""
    said: Kind | None = getattr(tasks, "kind", None)
    if said is not None:
        return said
    y = _array(tasks, "support_y")
    return "classification" if np.issubdtype(y.dtype, np.integer) else "regression"


def inputs(tasks: TaskDistribution) -> tuple[int, ...]:
    """Shape of one input."""
    said = getattr(tasks, "inputs", None)
    return tuple(_array(tasks, "support_x").shape[1:]) if said is None else tuple(said)


def outputs(tasks: TaskDistribution) -> int:
    """Targets of an example, or classes of a task."""
    said = getattr(tasks, "outputs", None)
    if said is not None:
        return int(said)
    y = _array(tasks, "support_y")
    return int(y.max()) + 1 if kind(tasks) == "classification" else int(np.prod(y.shape[1:], dtype=int))


def prepare(tasks: TaskDistribution) -> None:
    """Fetch, check and decode what the tasks are made of."""
    if hasattr(tasks, "prepare"):
        tasks.prepare()


def _array(tasks: TaskDistribution, key: str) -> Array:
    task = tasks.sample("train", seeds.generator(0, "train", 0, "task"))
    if key not in task:
        raise ValueError(
            f"{type(tasks).__name__} has tasks of {', '.join(task)}: without {key} it must say its kind, inputs and "
            "outputs itself (envs.base.TaskFamily)"
        )
    return np.asarray(task[key])
