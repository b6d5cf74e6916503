"""Private memory of driver and workers, and the object store, over 5000 sinusoid meta-iterations on Ray."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import ray

from cluster.fleet.ray_pool import RayPool
from cluster.setup import assemble, config
from cluster.setup.resolve import resolved
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from tests.bench.timing import machine

GROWTH = 0.02  # allowed after the first 500 iterations


def private(pid: int) -> int:
    """Private bytes of a process: what it alone maps, so neither plasma nor shared libraries."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) * 1024


def stored() -> float:
    """MiB of objects in Ray's store (plasma)."""
    from ray._private.internal_api import memory_summary  # no public function says it

    text = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    found = re.search(r"Plasma memory usage ([\d.]+) MiB", text)
    if not found:
        raise RuntimeError(f"Ray's memory summary has changed: {text[:200]}")
    return float(found[1])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--iterations", type=int, default=5000)
    iterations = arguments.parse_args().iterations
    print(machine())
    run = replace(config.load("sinusoid"), iterations=iterations, meta_batch=50, shard=25)
    run, _ = resolved(run)
    parts, params = assemble.recipe(run)
    pool = RayPool(parts, 2)
    samples: list[dict[str, float]] = []

    def sample() -> bool:
        if (
            driver.iteration % 250 == 0
            and driver.iteration
            and (not samples or samples[-1]["iteration"] != driver.iteration)
        ):
            pids = {"driver": os.getpid()} | {
                name: int(where.rpartition(":")[2]) for name, where in driver.workers.items()
            }
            samples.append(
                {"iteration": driver.iteration} | {n: private(p) / 2**20 for n, p in pids.items()} | {"store": stored()}
            )
            print(
                "  ".join(f"{k} {v:.1f}" if k != "iteration" else f"{k} {v:5d}" for k, v in samples[-1].items()),
                "(MiB)",
                flush=True,
            )
        return False

    driver = Driver(parts, params, pool, tempfile.mkdtemp(), iterations=iterations, meta_batch=50, shard=25,
                    interrupted=sample, evaluation=Evaluation(every=10**9, tasks=50, validation_tasks=50, steps=1,
                    pictures=0))  # fmt: skip
    driver.run()
    pool.close()
    first = next(s for s in samples if s["iteration"] >= min(500, iterations // 2))
    growth = {k: samples[-1][k] / first[k] - 1 for k in first if k not in ("iteration", "store")}
    flat = samples[-1]["store"] <= first["store"] + 1
    fine = all(g < GROWTH for g in growth.values()) and flat
    print("growth after the first 500:", ", ".join(f"{k} {g:+.2%}" for k, g in growth.items()),
          f"(wanted < {GROWTH:.0%});", "object store flat" if flat else "object store GROWS", "—",
          "reached" if fine else "MISSED")  # fmt: skip
    sys.exit(not fine)


if __name__ == "__main__":
    main()
