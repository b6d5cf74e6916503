"""One slow worker among four: throughput and time to a loss, synchronous, with backups, and asynchronous; quality at a
known staleness.

python tests/bench/bench_asynchronous.py      (about five minutes, nearly all of it asleep)
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.fleet.pool import LocalPool
from cluster.fleet.recipe import Recipe
from cluster.record.checkpoint import State
from cluster.record.journal import Unwritten
from cluster.setup import assemble, config
from cluster.training.asynchronous import Asynchronous
from cluster.training.dispatch import Dispatcher
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation, Pending
from cluster.training.ledger import Ledger
from cluster.training.policy import Policy
from cluster.training.synchronous import Synchronous
from learners.base import Meta, Params
from tests.bench.timing import machine, quiet
from tests.fakes import SleepyPool

SECONDS = [0.05, 0.05, 0.05, 0.5]
RATE = sum(1 / s for s in SECONDS)
SHARDS, SIZE, STEPS = 8, 5, 60
SEEDS = range(5)
POLICIES: dict[str, Policy] = {
    "synchronous": Synchronous(),
    "synchronous, backups": Synchronous(backups=3.0),
    "asynchronous": Asynchronous(max_staleness=64),
}
QUIET = Evaluation(every=10**9, validation_tasks=0, tasks=50, steps=1, pictures=0)


def sinusoids(seed: int) -> tuple[Recipe, Params]:
    run = config.load("sinusoid")
    return assemble.recipe(replace(run, seed=seed, execution="vmap", pool="local"))


def train(policy: Policy, recipe: Recipe, params: Params, every: int) -> tuple[list[float], list[float]]:
    """(seconds, held-out loss after one inner step) every so many steps; losses are taken when all is over."""
    seen: list[tuple[float, Meta]] = []
    with TemporaryDirectory() as folder:
        pool = SleepyPool(recipe, SECONDS)
        driver = Driver(recipe, params, pool, Path(folder), iterations=STEPS, meta_batch=SHARDS * SIZE, shard=SIZE,
                        policy=policy, evaluation=QUIET)  # fmt: skip
        step, begin = driver.iterate, time.perf_counter()

        def iterate() -> None:
            step()
            if driver.iteration % every == 0:
                seen.append((time.perf_counter() - begin, driver.meta))

        driver.iterate = iterate  # type: ignore[method-assign]
        driver.run()
        pool.close()
    judge = Dispatcher(LocalPool(recipe), Ledger(Unwritten()))
    states = [State(0, meta, {}) for _, meta in seen]
    return [t for t, _ in seen], [
        float(Pending(judge, s, "validation", 100, 100).result().mean["mse"][1]) for s in states
    ]


def main() -> None:
    quiet()
    print(machine())
    throughput: dict[str, list[float]] = {name: [] for name in POLICIES}
    reached: dict[str, list[float]] = {name: [] for name in POLICIES}
    for seed in SEEDS:
        recipe, params = sinusoids(seed)
        curves = {}
        for name, policy in POLICIES.items():
            curves[name] = train(policy, recipe, params, 5)
            throughput[name].append(STEPS * SHARDS / curves[name][0][-1])
        goal = 1.05 * curves["synchronous"][1][-1]
        for name, (clock, losses) in curves.items():
            reached[name].append(next((t for t, loss in zip(clock, losses, strict=True) if loss <= goal), float("inf")))
    print(f"\nfour workers, {SECONDS} s a shard, {SHARDS} shards a batch, {STEPS} steps, medians of {len(SEEDS)} seeds")
    print(f"the sum of the workers' rates is {RATE:.0f} shards/s; the goal is the synchronous run's last loss + 5 %")
    for name in POLICIES:
        rate, seconds = statistics.median(throughput[name]), statistics.median(reached[name])
        print(f"  {name:22s} {rate:6.1f} shards/s, {rate / RATE:.2f} of that sum; {seconds:6.1f} s to the goal")
    share = statistics.median(throughput["asynchronous"]) / RATE
    faster = statistics.median(reached["asynchronous"]) / statistics.median(reached["synchronous"])
    print(
        f"  asynchronous: {share:.2f} of the sum of rates (wanted 0.95), {faster:.2f} of the synchronous time (wanted "
        "at most 0.6)"
    )
    sys.exit(share < 0.95 or faster > 0.6)


if __name__ == "__main__":
    main()
