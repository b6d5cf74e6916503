"""What Ray costs: one worker against LocalPool, at 10, 100 and 1000 ms per shard, four shards an iteration, two in
flight.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch

from cluster.fleet.pool import LocalPool
from cluster.fleet.ray_pool import RayPool
from cluster.fleet.recipe import Recipe
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from learners.algorithms.maml import MAML
from learners.base import Data, Gradient, Meta, Objective
from learners.outer.descent import Descent
from tests.bench import timing
from tests.bench.timing import machine, quiet
from tests.quadratics import Quadratic, QuadraticTasks

WANTED = {0.1: 0.03}  # seconds per shard → largest share that Ray may add


@dataclass(frozen=True)
class Busy:
    """MAML whose gradient takes a fixed time: a stand-in for real work of any length."""

    seconds: float

    def init(self, params, rng: np.random.Generator) -> Meta:
        return Meta(params, {})

    def draw(self, data, rng: np.random.Generator, steps: int):
        return data

    def path(self, meta: Meta, objective: Objective, data: Data, steps: int):
        return MAML(0.01).path(meta, objective, data, steps)

    def adapt(self, meta: Meta, objective: Objective, data: Data, steps: int):
        return MAML(0.01).adapt(meta, objective, data, steps)

    def gradient(self, meta: Meta, objective: Objective, data: Data) -> Gradient:
        time.sleep(self.seconds)
        return Gradient({"theta": torch.zeros(10_000)}, {}, {"loss": torch.zeros(())})

    def claim(self):
        return "nothing"

    def at_test(self):
        return self


class Nothing(Quadratic):
    """An objective that measures nothing."""

    def measure(self, params, data: Data):
        return {"loss": torch.zeros(())}


def main() -> None:
    quiet()
    print(machine())
    fine = True
    for seconds, iterations in ((0.01, 100), (0.1, 20), (1.0, 4)):
        recipe = Recipe(QuadraticTasks(1), Busy(seconds), Nothing(), Descent(), evaluation_steps=0)
        local, ray = (iteration_seconds(pool, recipe, iterations) for pool in (LocalPool(recipe), RayPool(recipe, 1)))
        cost = ray / local - 1
        bar = WANTED.get(seconds)
        fine &= bar is None or cost <= bar
        note = "" if bar is None else f" (wanted ≤ {bar:.0%}: {'reached' if cost <= bar else 'MISSED'})"
        print(
            f"{seconds * 1e3:6.0f} ms a shard: local {local * 1e3:8.1f} ms, Ray {ray * 1e3:8.1f} ms; Ray costs "
            f"{cost:+.1%}{note}"
        )
    sys.exit(not fine)


def iteration_seconds(pool, recipe: Recipe, iterations: int) -> float:
    driver = Driver(recipe, {"theta": torch.zeros(10_000)}, pool, tempfile.mkdtemp(), iterations=iterations + 2,
                    meta_batch=4, shard=1, evaluation=Evaluation(every=10**9, tasks=1, validation_tasks=1, steps=0,
                    pictures=0))  # fmt: skip
    seconds = timing.iteration_seconds(driver, leave_out=2)
    pool.close()
    return seconds


if __name__ == "__main__":
    main()
