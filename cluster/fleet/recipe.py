"""What a worker is made from: everything that decides a run's numbers, but θ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from cluster.fleet import seeds, wire
from cluster.fleet.machine import Determinism
from envs.base import HELD_OUT, HOST, Arrays, HasFixedTasks, HasGroups, TaskDistribution
from learners import verbs
from learners.base import GROUP, Data, Learner, Objective, Outer, Verb
from learners.engine.execution import Mode
from learners.objectives.robustness import Robustness


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's numbers, but θ: what a worker is made from, pickled once at its start.

    `compression` is of contributions on the wire.
    """

    tasks: TaskDistribution
    learner: Learner
    objective: Objective
    outer: Outer
    seed: int = 0
    evaluation_seed: int = 0
    evaluation_steps: int = 10
    robustness: Robustness | None = None
    execution: Mode = "loop"
    chunk: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "cpu"
    threads: int = 1
    compression: wire.Compression = "none"
    gradient_checkpointing: bool = False
    deterministic: Determinism = "on"

    def summary(self) -> str:
        """One line on what the numbers are of."""
        how = f"mean over tasks, {self.execution}, {self.dtype}, seed {self.seed}"
        return f"{self.learner!r}, {self.objective.summary()}, {how}"

    def verbs(self, objective: Objective) -> Mapping[str, Verb]:
        """The verbs every run has, and those of its outer step."""
        common = verbs.common_verbs(self.learner, objective, self.evaluation_steps, self.robustness)
        own, data = self.outer.verbs(self.learner, objective), common["gradient"]
        return {
            **common,
            **{k: v if v.draw else replace(v, draw=data.draw, record=data.record) for k, v in own.items()},
        }

    def groups(self) -> tuple[str, ...]:
        """Names of the kinds of tasks that are reported apart."""
        return self.tasks.groups if isinstance(self.tasks, HasGroups) else ()

    def task(self, split: str, index: int, verb: Verb) -> Arrays:
        """Task `index` of `split`, complete for `verb`. Held-out tasks do not depend on the run's seed."""
        seed = self.evaluation_seed if split in HELD_OUT else self.seed
        fixed = self.tasks.fixed(split, index) if isinstance(self.tasks, HasFixedTasks) else None
        data = self.tasks.sample(split, seeds.generator(seed, split, index, "task")) if fixed is None else dict(fixed)
        if isinstance(self.tasks, HasGroups) and self.groups():
            data = data | {GROUP: np.asarray(self.tasks.group(data))}
        return verb.draw(data, seeds.generator(seed, split, index, "draw")) if verb.draw else data

    def tensors(self, arrays: Arrays) -> Data:
        """Arrays as tensors on the run's device, floating ones in the run's dtype; those under `host/` stay here."""
        data = {k: wire.owned(v) for k, v in arrays.items()}
        dtype = getattr(torch, self.dtype)
        return {
            k: v.to("cpu" if k.startswith(HOST) else self.device, dtype if v.is_floating_point() else v.dtype)
            for k, v in data.items()
        }
