"""What journal, ledger and lease cost a run of 100 ms shards: their own time beside the run's, four workers that sleep.

python tests/bench/bench_accounts.py
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster.record.journal import Journal
from cluster.record.lease import Lease
from cluster.training.asynchronous import Asynchronous
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from cluster.training.ledger import Ledger
from cluster.training.policy import Policy
from cluster.training.synchronous import Synchronous
from tests.bench.timing import machine, quiet
from tests.fakes import SleepyPool, quadratic_recipe, start

SECONDS, WORKERS, SHARDS, STEPS = 0.1, 4, 8, 40
WANTED = 0.02
OURS = {
    Journal: ("write", "sync"),
    Ledger: ("dispatch", "arrive", "apply", "is_open", "abandon"),
    Lease: ("check", "_write"),
}


def measured(spent: Counter[str], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, its time added to `spent`; time within another measured method is that one's."""

    def run(*args: Any, **options: Any) -> Any:
        if spent["inside"]:
            return method(*args, **options)
        spent["inside"], begin = 1, time.perf_counter_ns()
        try:
            return method(*args, **options)
        finally:
            spent[name] += time.perf_counter_ns() - begin
            spent["inside"] = 0

    return run


def main() -> None:
    quiet()
    print(machine())
    spent: Counter[str] = Counter()
    for cls, names in OURS.items():
        for name in names:
            setattr(cls, name, measured(spent, cls.__name__, getattr(cls, name)))
    worst = 0.0
    policies: dict[str, Policy] = {"synchronous": Synchronous(), "asynchronous": Asynchronous()}
    for label, policy in policies.items():
        spent.clear()
        recipe = quadratic_recipe()
        with TemporaryDirectory() as folder:
            pool = SleepyPool(recipe, [SECONDS] * WORKERS)
            driver = Driver(recipe, start(), pool, Path(folder), iterations=STEPS, meta_batch=SHARDS, shard=1,
                            policy=policy, evaluation=Evaluation(every=10**9, validation_tasks=0, tasks=4, steps=1,
                            pictures=0))  # fmt: skip
            begin = time.perf_counter()
            driver.run()
            whole = time.perf_counter() - begin
            pool.close()
        share = sum(v for k, v in spent.items() if k != "inside") / 1e9 / whole
        worst = max(worst, share)
        parts = ", ".join(f"{k} {v / 1e3 / STEPS / SHARDS:.0f}" for k, v in spent.items() if k != "inside")
        print(
            f"{label:13s} {whole:5.1f} s for {STEPS * SHARDS} shards of {SECONDS * 1e3:.0f} ms; µs per shard: {parts}"
        )
        print(f"{'':13s} {100 * share:.2f} % of the run")
    print(f"wanted: at most {100 * WANTED:.0f} %")
    sys.exit(worst > WANTED)


if __name__ == "__main__":
    main()
