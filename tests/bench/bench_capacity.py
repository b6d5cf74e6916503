"""How many contributions a second the driver takes: workers that do no work but answer through Ray, real messages, real
driver.

python tests/bench/bench_capacity.py [SECONDS PER POINT]      (some minutes; writes capacity.png beside this file)

A cost model is fitted on up to 16 workers, has to predict 32 and 64, and is then asked about 1000.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import msgpack
import numpy as np
import ray
import torch

from cluster.fleet import wire
from cluster.fleet.machine import environment
from cluster.fleet.messages import Assignment
from cluster.fleet.ray_pool import RETURNED_INLINE, RayPool
from cluster.fleet.recipe import Recipe
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from learners.algorithms.maml import MAML
from learners.base import Params, Sum, pack
from learners.outer.descent import Descent
from tests.bench.timing import machine, quiet
from tests.quadratics import Quadratic, QuadraticTasks

SIZES = (10**4, 10**5, 10**6)
WORKERS = (1, 2, 4, 6, 8, 12, 16, 32, 64)
FITTED = 16
TERMS = ("a call", "a result by the object store", "a number", "a lone worker's latency", "a worker to look after")
SHARDS = 128  # a meta-iteration
VERSIONS = 10_000
QUIET = Evaluation(every=10**9, validation_tasks=0, tasks=1, steps=0, pictures=0)


class Simulated:
    """Answers every assignment with a vector as long as θ; does not even import torch."""

    def __init__(self, parts: Any, name: str) -> None:
        self.parts, self.name = parts, name

    def hello(self) -> tuple[str, dict[str, str], dict[str, str]]:
        return f"{socket.gethostname()}:{os.getpid()}", self.parts.environment, {}

    def run(self, message: bytes, at: Any, operand: Any) -> tuple[bytes, Any]:
        a = msgpack.unpackb(message)
        if at is not None:
            self.size = at[1].size
        encoded, vector = self.parts.answers[self.size if a["verb"] == "gradient" else 0]
        header = msgpack.unpackb(encoded) | {"ticket": a["ticket"], "attempt": a["attempt"], "worker": self.name}
        return msgpack.packb(header), vector


class SimulatedPool(RayPool):
    """Simulated workers, as many more as are asked for."""

    actor = Simulated

    def grow(self, workers: int) -> None:
        """Wait until there are so many."""
        for _ in range(workers - len(self._actors)):
            self._spawn()
        while not all(a.ready for a in self._actors):
            self.poll(1.0)


def theta(size: int) -> Params:
    return {f"p{i}": torch.zeros(size // 10) for i in range(10)}


def simulated(sums: Literal["driver", "fleet"]) -> SimulatedPool:
    """A pool with one simulated worker."""
    a = Assignment(0, 0, "gradient", 0, None, "train", 0, 1, 0)
    answers = {n: wire.encode_sum(a, "", 0.0, Sum(pack(theta(n), {}), 1.0, {"loss": torch.zeros(1)})) for n in SIZES}
    answers[0] = wire.encode_sum(a, "", 0.0, Sum({}, 1.0, {"loss": torch.zeros(1, 1)}))
    parts: Any = SimpleNamespace(tasks=None, answers=answers, environment=environment())
    return SimulatedPool(parts, 1, cpus_per_worker=0.01, sums=sums)


def run(pool: SimulatedPool, size: int, shards: int, goes_on: Callable[[int], bool]) -> None:
    """A driver at work with `pool` as long as `goes_on(iteration)`."""
    recipe = Recipe(QuadraticTasks(), MAML(), Quadratic(), Descent(optimizer="sgd", lr=0.0))
    with tempfile.TemporaryDirectory() as folder:
        driver = Driver(
            recipe, theta(size), pool, folder, iterations=10**9, meta_batch=shards, shard=1, evaluation=QUIET
        )
        step = driver.iterate

        def iterate() -> None:
            step()
            if not goes_on(driver.iteration):
                driver.iterations = driver.iteration

        driver.iterate = iterate  # type: ignore[method-assign]
        driver.run()


def rate(pool: SimulatedPool, size: int, seconds: float) -> float:
    """Contributions a second, median over iterations, the first two left out."""
    clock: list[float] = []

    def goes_on(iteration: int) -> bool:
        clock.append(time.perf_counter())
        return len(clock) < 5 or clock[-1] - clock[1] < seconds

    run(pool, size, SHARDS, goes_on)
    return SHARDS / float(np.median(np.diff(clock[1:])))


def features(size: int, workers: int) -> list[float]:
    """What a contribution's time is made of: TERMS. Latency is shared by the workers."""
    return [1.0, float(4 * size > RETURNED_INLINE), size, 1 / workers, workers]


def fitted(points: dict[tuple[int, int], float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Coefficients of least relative error, of points with up to FITTED workers."""
    rows = {k: v for k, v in points.items() if k[1] <= FITTED}
    a = np.array([np.array(features(*k)) * v for k, v in rows.items()])  # time × rate should be 1
    solution: np.ndarray[Any, np.dtype[np.float64]] = np.linalg.lstsq(a, np.ones(len(a)), rcond=None)[0]
    return solution


def memory() -> None:
    """Driver and object store over many versions of θ."""
    pool = simulated("driver")
    pool.grow(2)
    seen: list[tuple[float, float]] = []

    def goes_on(iteration: int) -> bool:
        if iteration in (VERSIONS // 10, VERSIONS):
            left = ray.available_resources()["object_store_memory"] / ray.cluster_resources()["object_store_memory"]
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            seen.append((resident / 2**20, 100 * (1 - left)))
        return iteration < VERSIONS

    run(pool, 10**5, 4, goes_on)
    pool.close()
    (early, store), (late, store_late) = seen
    print(f"\n{VERSIONS} versions of 10⁵ parameters: driver {early:.0f} MiB after a tenth, {late:.0f} MiB at the end "
          f"({100 * (late / early - 1):+.1f} %); object store {store:.1f} % and {store_late:.1f} % full")  # fmt: skip


def plot(rates: dict[str, dict[tuple[int, int], float]], costs: dict[str, Any], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    fine = np.geomspace(1, 1000, 60)
    for axis, (sums, points) in zip(figure.subplots(1, 2, sharey=True), rates.items(), strict=True):
        for i, size in enumerate(SIZES):
            axis.plot(fine, [1 / (np.array(features(size, w)) @ costs[sums]) for w in fine], color=f"C{i}", alpha=0.6)
            axis.plot(WORKERS, [points[size, w] for w in WORKERS], "o", color=f"C{i}", label=f"{size:,} parameters")
        axis.axvline(FITTED, color="gray", linewidth=0.7, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="workers", title=f"added by the {sums}")
    figure.axes[0].set_ylabel("contributions a second (line: model)")
    figure.axes[0].legend(fontsize="small", loc="lower left")
    figure.savefig(out, dpi=110)


def main() -> None:
    quiet()
    print(machine())
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 4.0
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", object_store_memory=2 << 30)
    rates: dict[str, dict[tuple[int, int], float]] = {}
    costs, worst = {}, {}
    kinds: tuple[Literal["driver", "fleet"], ...] = ("driver", "fleet")
    for sums in kinds:
        pool = simulated(sums)
        points: dict[tuple[int, int], float] = {}
        for workers in WORKERS:
            pool.grow(workers)
            points |= {(size, workers): rate(pool, size, seconds) for size in SIZES}
        pool.close()
        rates[sums] = points
        cost = costs[sums] = fitted(points)
        print(f"\ncontributions/s, added by the {sums}: measured (model)")
        print("parameters" + "".join(f"{w:>16d}" for w in (*WORKERS, 1000)))
        errors: list[float] = []
        for size in SIZES:
            model = {w: 1 / (np.array(features(size, w)) @ cost) for w in (*WORKERS, 1000)}
            cells = [f"{points[size, w]:7.0f} ({model[w]:6.0f})" for w in WORKERS]
            print(f"{size:10d} " + " ".join(cells) + f"         ({model[1000]:6.0f})")
            errors += [abs(model[w] / points[size, w] - 1) for w in WORKERS if w > FITTED]
        worst[sums] = max(errors)
        print("fitted: " + ", ".join(f"{name} {1e6 * c:.3g} µs" for name, c in zip(TERMS, cost, strict=True)))
    told = ", ".join(f"added by the {sums} {100 * error:.0f} %" for sums, error in worst.items())
    print(f"\nthe model, fitted on up to {FITTED} workers, errs on 32 and 64 by at most: {told} (wanted 20)")
    plot(rates, costs, Path(__file__).with_name("capacity.png"))
    memory()
    sys.exit(worst["driver"] > 0.2)  # on one machine the fleet's adders share the driver's processors


if __name__ == "__main__":
    main()
