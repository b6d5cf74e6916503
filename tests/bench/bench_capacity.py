"""How many contributions a second the driver takes: workers that do no work but answer through Ray, real messages, real driver.

python tests/bench/bench_capacity.py [SECONDS PER POINT]      (about ten minutes; writes capacity.png beside this file)

A cost model is fitted on up to 16 workers, has to predict 32 and 64, and is then asked about 1000.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import ray
import torch

from cluster import wire
from cluster.driver import Driver
from cluster.evaluate import Evaluation
from cluster.messages import Assignment
from cluster.ray_pool import RayPool
from cluster.worker import Recipe, environment
from learners.base import Sum, pack
from learners.maml import MAML
from learners.outer import Descent
from tests.bench.timing import machine, quiet
from tests.quadratics import Quadratic, QuadraticTasks

SIZES = (10**4, 10**5, 10**6)
WORKERS = (1, 2, 4, 8, 16, 32, 64)
FITTED = 16
SHARDS = 128  # a meta-iteration
VERSIONS = 10_000
QUIET = Evaluation(every=10**9, validation_tasks=0, tasks=1, steps=0, pictures=0)


class Simulated:
    """Answers every assignment with the same vector; does not even import torch."""

    def __init__(self, parts: Any, name: str) -> None:
        self.parts, self.name = parts, name

    def hello(self) -> tuple[str, dict[str, str], dict[str, str]]:
        return f"{socket.gethostname()}:{os.getpid()}", self.parts.environment, {}

    def run(self, message: bytes, at: Any, operand: Any) -> tuple[bytes, Any]:
        a = msgpack.unpackb(message)
        light = a["verb"] != "gradient"
        header = msgpack.unpackb(self.parts.light if light else self.parts.header)
        header |= {"ticket": a["ticket"], "attempt": a["attempt"], "worker": self.name}
        return msgpack.packb(header), self.parts.vector[:0] if light else self.parts.vector


class SimulatedPool(RayPool):
    actor = Simulated


def made(size: int, workers: int, sums: str, folder: str, iterations: int) -> tuple[Driver, RayPool]:
    """A driver with θ of `size` numbers, and simulated workers."""
    params = {f"p{i}": torch.zeros(size // 10) for i in range(10)}
    recipe = Recipe(QuadraticTasks(), MAML(), Quadratic(), Descent(optimizer="sgd", lr=0.0))
    a, rows = Assignment(0, 0, "gradient", 0, None, "train", 0, 1, 0), {"loss": torch.zeros(1)}
    header, vector = wire.encode_sum(a, "", 0.0, Sum(pack(params, {}), 1.0, rows))
    light, _ = wire.encode_sum(a, "", 0.0, Sum({}, 1.0, {"loss": torch.zeros(1, 1)}))
    parts: Any = SimpleNamespace(tasks=None, header=header, light=light, vector=vector, environment=environment())
    pool = SimulatedPool(parts, workers, cpus_per_worker=0.01, sums=sums)  # type: ignore[arg-type]
    return Driver(recipe, params, pool, folder, iterations=iterations, meta_batch=SHARDS, shard=1, evaluation=QUIET), pool


def rate(size: int, workers: int, sums: str, seconds: float) -> float:
    """Contributions a second, after all workers have joined."""
    with tempfile.TemporaryDirectory() as folder:
        driver, pool = made(size, workers, sums, folder, 10**9)
        clock: list[float] = []
        step = driver.iterate

        def iterate() -> None:
            step()
            if len(driver.workers) == workers:
                clock.append(time.perf_counter())
            if len(clock) > 3 and clock[-1] - clock[1] > seconds:
                driver.iterations = driver.iteration

        driver.iterate = iterate  # type: ignore[method-assign]
        driver.run()
        pool.close()
    return SHARDS * (len(clock) - 2) / (clock[-1] - clock[1])


def features(size: int, workers: int) -> list[float]:
    """Of a contribution's time: a call; its bytes; broadcasting θ to each worker, spread over the shards; one worker's latency; bytes again."""
    return [1.0, size, workers / SHARDS, size * workers / SHARDS, 1 / workers, size / workers]


def fitted(points: dict[tuple[int, int], float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Non-negative coefficients of least relative error, of points with up to FITTED workers."""
    rows = {k: v for k, v in points.items() if k[1] <= FITTED}
    a = np.array([np.array(features(*k)) * v for k, v in rows.items()])  # time × rate should be 1
    kept = list(range(a.shape[1]))
    while True:
        solution = np.linalg.lstsq(a[:, kept], np.ones(len(a)), rcond=None)[0]
        if (solution >= 0).all():
            return np.array([solution[kept.index(i)] if i in kept else 0.0 for i in range(a.shape[1])])
        kept.pop(int(np.argmin(solution)))


def memory() -> None:
    """Driver, workers and object store over many versions of θ."""
    with tempfile.TemporaryDirectory() as folder:
        driver, pool = made(10**5, 2, "driver", folder, VERSIONS)
        driver.meta_batch = 4
        seen: dict[int, tuple[float, float]] = {}
        step = driver.iterate

        def iterate() -> None:
            step()
            if driver.iteration in (VERSIONS // 10, VERSIONS):
                left = ray.available_resources()["object_store_memory"] / ray.cluster_resources()["object_store_memory"]
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                seen[driver.iteration] = resident / 2**20, 1 - left

        driver.iterate = iterate  # type: ignore[method-assign]
        driver.run()
        pool.close()
    (early, store), (late, store_late) = seen.values()
    print(f"\n{VERSIONS} versions of 10⁵ parameters: driver {early:.0f} MiB after a tenth, {late:.0f} MiB at the end "
          f"({100 * (late / early - 1):+.1f} %), object store {100 * store:.1f} % and {100 * store_late:.1f} % full")  # fmt: skip


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
    figure.axes[0].set_ylabel("contributions a second (line: model, fitted left of the dots)")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(out, dpi=110)


def main() -> None:
    quiet()
    print(machine())
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 4.0
    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", object_store_memory=2 << 30)
    rates: dict[str, dict[tuple[int, int], float]] = {}
    costs, worst = {}, 0.0
    for sums in ("driver", "fleet"):
        points = rates[sums] = {(size, w): rate(size, w, sums, seconds) for size in SIZES for w in WORKERS}
        cost = costs[sums] = fitted(points)
        print(f"\ncontributions/s, added by the {sums}: measured (model)")
        print("parameters" + "".join(f"{w:>16d}" for w in (*WORKERS, 1000)))
        for size in SIZES:
            model = {w: 1 / (np.array(features(size, w)) @ cost) for w in (*WORKERS, 1000)}
            cells = [f"{points[size, w]:7.0f} ({model[w]:6.0f})" for w in WORKERS]
            print(f"{size:10d} " + " ".join(cells) + f"         ({model[1000]:6.0f})")
            worst = max([worst, *(abs(model[w] / points[size, w] - 1) for w in WORKERS if w > FITTED)])
        print(
            "cost of a contribution (µs): " + ", ".join(f"{1e6 * c:.3g}" for c in cost) + "  × " + features.__doc__.split(":", 1)[1].strip()
        )  # type: ignore[union-attr]
    print(f"\nthe model, fitted on up to {FITTED} workers, errs by {100 * worst:.0f} % at most on 32 and 64 (wanted 20)")
    plot(rates, costs, Path(__file__).with_name("capacity.png"))
    memory()
    sys.exit(worst > 0.2)


if __name__ == "__main__":
    main()
