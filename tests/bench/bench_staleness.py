"""What a staleness of exactly 8 costs: sinusoids, equal work, with the weight and without.

python tests/bench/bench_staleness.py [ITERATIONS] [SEEDS]      (70 000 iterations: a quarter of an hour per seed)
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.fleet.pool import LocalPool
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
from tests.bench.timing import machine, quiet

STALENESS, TASKS = 8, 25
WANTED = 1.1
# first in, first out: every contribution is used eight steps after it was asked for
UNDER_WAY = {"buffer": 1, "in_flight": STALENESS + 1}
POLICIES: dict[str, Policy] = {
    "synchronous": Synchronous(),
    "weight (1 + s)^-½": Asynchronous(**UNDER_WAY),
    "no weight": Asynchronous(**UNDER_WAY, power=0.0),
}


def loss(policy: Policy, iterations: int, seed: int) -> float:
    """Error after one inner step on 600 held-out sinusoids."""
    run = config.load("sinusoid")
    run = replace(
        run, seed=seed, execution="vmap", pool="local", outer=replace(run.outer, lr=0.003, horizon=iterations)
    )  # type: ignore[type-var]
    parts, params = assemble.recipe(run)
    with TemporaryDirectory() as folder:
        driver = Driver(parts, params, LocalPool(parts), Path(folder), iterations=iterations, meta_batch=TASKS,
                        shard=TASKS, policy=policy, evaluation=Evaluation(every=10**9, validation_tasks=0, tasks=4,
                        steps=1, pictures=0))  # fmt: skip
        driver.run()
    judge = Dispatcher(LocalPool(parts), Ledger(Unwritten()))
    return float(Pending(judge, State(0, driver.meta, {}), "validation", 600, 200).result().mean["mse"][1])


def main() -> None:
    quiet()
    print(machine())
    iterations, seeds = (int(w) for w in (*sys.argv[1:], *("20000", "1")[len(sys.argv) - 1 :]))
    found = {
        name: statistics.median(loss(p, iterations, seed) for seed in range(seeds)) for name, p in POLICIES.items()
    }
    print(
        f"{iterations} iterations of {TASKS} tasks, Adam, cosine from 0.003, medians of {seeds} seeds; staleness "
        f"{STALENESS} but in sync"
    )
    for name, value in found.items():
        print(f"  {name:18s} {value:.4f}   × {value / found['synchronous']:.3f}")
    print(f"(wanted with the weight: at most {WANTED})")
    sys.exit(found["weight (1 + s)^-½"] > WANTED * found["synchronous"])


if __name__ == "__main__":
    main()
