"""The driver's own time per meta-iteration, against the number of contributions and of parameters."""

from __future__ import annotations

import tempfile

import numpy as np
import torch

from cluster.fleet import wire
from cluster.fleet.machine import environment
from cluster.fleet.messages import Assignment, Contribution, Event, FleetEvent
from cluster.fleet.recipe import Recipe
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from learners.algorithms.maml import MAML
from learners.base import Params
from learners.outer.descent import Descent
from tests.bench import timing
from tests.bench.timing import machine, quiet
from tests.quadratics import Quadratic, QuadraticTasks


class Instant:
    """A pool that answers at once, with ready-made contributions: what remains is the driver."""

    def __init__(self, params: Params) -> None:
        self.layout, self.vector = wire.flatten({f"params/{k}": v for k, v in params.items()})
        self.events: list[Event] = [FleetEvent("joined", "instant", "here:0", environment())]
        self.handle = 0

    def publish(self, value: Params) -> int:
        wire.broadcast(value)
        self.handle += 1
        return self.handle

    def release(self, handle: int) -> None:
        pass

    def free(self) -> int:
        return 16 - len(self.events)

    def submit(self, a: Assignment) -> None:
        layout, vector = ((), np.zeros(0, np.float32)) if a.verb == "evaluate" else (self.layout, self.vector)
        rows = {"loss": np.zeros((1, 1), np.float32)}
        self.events.append(Contribution(a.ticket, a.attempt, "instant", 0.0, 1.0, layout, vector, rows))

    def poll(self, timeout: float) -> list[Event]:
        events, self.events = self.events, []
        return events

    def close(self) -> None:
        pass


def main() -> None:
    quiet()
    print(machine())
    print(
        "driver's own time per meta-iteration, Adam, median of 5 (ms); floor: reading every contribution once at 10 "
        "GB/s"
    )
    print(f"{'contributions':>14s} {'parameters':>12s} {'time':>10s} {'floor':>10s}")
    for size in (10**4, 10**6, 10**7):
        for contributions in (10, 100, 1000):
            seconds = measure(size, contributions, 2 if size * contributions > 10**9 else 5)
            floor = size * 4 * contributions / 10e9
            print(f"{contributions:14d} {size:12d} {seconds * 1e3:10.1f} {floor * 1e3:10.1f}")


def measure(size: int, contributions: int, iterations: int) -> float:
    params = {f"p{i}": torch.zeros(size // 10) for i in range(10)}
    recipe = Recipe(QuadraticTasks(), MAML(), Quadratic(), Descent())
    driver = Driver(recipe, params, Instant(params), tempfile.mkdtemp(), iterations=iterations + 1,
                    meta_batch=contributions, shard=1, evaluation=Evaluation(every=10**9, tasks=1, validation_tasks=1,
                    steps=0, pictures=0))  # fmt: skip
    return timing.iteration_seconds(driver, leave_out=1)


if __name__ == "__main__":
    main()
