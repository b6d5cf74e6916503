"""The run that chaos is visited upon: python -m tests.chaos_driver FOLDER POLICY ADDRESS

FOLDER/run is its directory. A worker that finds FOLDER/nan takes the file away and answers with numbers that are not
finite, once. Some answers come twice. SIGTERM ends the run; it goes on for ever otherwise.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.fleet.deadlines import Deadlines
from cluster.fleet.messages import Contribution, Event
from cluster.fleet.recipe import Recipe
from cluster.record.checkpoint import Checkpointing
from cluster.results import monitor
from cluster.training.asynchronous import Asynchronous
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from cluster.training.policy import Policy
from cluster.training.synchronous import Synchronous
from learners.algorithms.maml import MAML
from learners.base import Data, Gradient, Meta, Objective, Params
from learners.engine import tree
from learners.outer.descent import Descent
from tests.fakes import quadratic_recipe

LIMITS = Deadlines(floor=3.0, first=20.0)
POLICIES: dict[str, Policy] = {
    "synchronous": Synchronous(deadlines=LIMITS, max_attempts=50),
    "asynchronous": Asynchronous(deadlines=LIMITS, max_attempts=50),
}
BATCH, SHARD = 16, 4


@dataclass(frozen=True)
class Trapped(MAML):
    """MAML that takes its time, and steps into the trap that FOLDER/nan is."""

    folder: str = ""
    seconds: float = 0.0
    """Per task."""

    def gradient(self, meta: Meta, objective: Objective, data: Data) -> Gradient:
        found = super().gradient(meta, objective, data)
        time.sleep(self.seconds)
        try:
            os.unlink(Path(self.folder, "nan"))
        except FileNotFoundError:
            return found
        return found._replace(grads=tree.scale(float("nan"), found.grads))


def recipe(folder: str = "", seconds: float = 0.0) -> Recipe:
    """Without a folder: what the run would be if nothing happened to it."""
    return quadratic_recipe(
        learner=Trapped(0.05, 1, folder=folder, seconds=seconds), outer=Descent(optimizer="sgd", lr=0.01, momentum=0.9)
    )


def theta() -> Params:
    return {"theta": torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)}


def main() -> None:
    folder, policy, address = sys.argv[1:]
    from cluster.fleet.ray_pool import RayPool

    class Echoing(RayPool):
        """One answer in twenty comes again, some polls later."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.rng, self.echoes = np.random.default_rng(0), deque[Event]()

        def poll(self, timeout: float) -> list[Event]:
            events = super().poll(timeout)
            for event in events:
                if isinstance(event, Contribution) and self.rng.random() < 0.05:
                    self.echoes.append(event)
            if self.echoes and self.rng.random() < 0.3:
                events.append(self.echoes.popleft())
            return events

    monitor.plain_logging()
    stop: list[int] = []
    parts = recipe(folder, 0.02)
    pool = Echoing(parts, 3, address=address, limits=LIMITS)
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    driver = Driver(parts, theta(), pool, Path(folder) / "run", iterations=10**9, meta_batch=BATCH, shard=SHARD,
                    policy=POLICIES[policy], checkpoint=Checkpointing(seconds=1.0),
                    evaluation=Evaluation(every=10**9, validation_tasks=0), interrupted=lambda: bool(stop))  # fmt: skip
    try:
        driver.run()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)
    finally:
        pool.close()


if __name__ == "__main__":
    main()
